#!/bin/sh
# An experiment: one run per variant, then all of them measured side by side. `make experiment` calls this.
# Stop it at any moment: the same call goes on and repeats nothing that was complete.
set -eu

variants=$(coldctl variants "$EXPERIMENT" --output "$TO")
set --
while read -r iterations name; do
    echo "$name" >&2
    RUN=$TO/$name CONFIG=$TO/$name.toml ITERATIONS=0 TARGET=$iterations JOBS="$JOBS" SAMPLE='' GATE='' sh scripts/iterate.sh </dev/null
    set -- "$@" "$TO/$name"
    suite=$TO/$name.toml # the end of the list leaves `name` empty
done <<EOF
$variants
EOF

coldctl evaluate "$@" --suite "$suite" --output "$TO/evaluation" --jobs "$JOBS"
