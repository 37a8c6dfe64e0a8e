#!/bin/sh
# One round of ColD Fusion on the cluster. SHARED (see cluster.yaml) holds venv/, suite.toml and the run.
set -eu

cd "$1"
PATH=$PWD/venv/bin:$PATH
run=runs/cluster
numbers=$(coldctl plan "$run" --config suite.toml)
number=${numbers%%[!0-9]*} # the first, if several are still to be made
pretrained=$(coldctl status "$run" --pretrained)
iteration=$run/iteration-$number

coldctl finetune --suite suite.toml --base "$run" --output "$run" --engine ray --ray-address auto
coldctl fuse "$iteration/contributions" --config suite.toml --base "$run" --output "$iteration/fused" --engine ray --ray-address auto
coldctl evaluate "$iteration/fused" --suite suite.toml --baseline "$pretrained" --output "$iteration/evaluation" \
    --engine ray --ray-address auto
coldctl promote "$run"
