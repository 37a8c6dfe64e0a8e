#!/bin/sh
# Full rounds of ColD Fusion: finetune, fuse, evaluate, promote. `make iterate` calls this with its variables.
# Stop it at any moment: the same call goes on and repeats nothing that was complete.
set -eu

[ "$GATE" = 0 ] && GATE=
plan="${SAMPLE:+--sample $SAMPLE} ${GATE:+--gate} ${TARGET:+--target $TARGET}"
# shellcheck disable=SC2086 # flags without spaces
iterations=$(coldctl plan "$RUN" --config "$CONFIG" --iterations "$ITERATIONS" $plan)
pretrained=$(coldctl status "$RUN" --pretrained)

for number in $iterations; do
    iteration=$RUN/iteration-$number
    echo "iteration $number" >&2
    coldctl finetune --suite "$CONFIG" --base "$RUN" --output "$RUN" --jobs "$JOBS" \
        ${SIGN_KEY:+--sign-key "$SIGN_KEY"}
    coldctl fuse "$iteration/contributions" --config "$CONFIG" --base "$RUN" --output "$iteration/fused"
    coldctl evaluate "$iteration/fused" --suite "$CONFIG" --baseline "$pretrained" --output "$iteration/evaluation" --jobs "$JOBS"
    if [ -n "$GATE" ]; then # no regression against the iteration's own base? `promote` reads the answer
        coldctl evaluate "$iteration/fused" --suite "$CONFIG" --baseline "$RUN" --output "$iteration/gate" --jobs "$JOBS" --quiet
    fi
    coldctl promote "$RUN"
done
