#!/bin/bash
# Submit one round of ColD Fusion to Slurm: an array of finetunings, then one job that fuses what they made.
#
#   RUN=/shared/run SUITE=/shared/suite.toml bash round.sh amazon movies tweets
#
# The arguments are the suite's datasets that contribute. Partitions, accounts and GPUs are up to your cluster: add them to
# the #SBATCH lines of finetune.sbatch and fuse.sbatch. coldctl must be on the PATH of the nodes.
set -euo pipefail

export RUN SUITE DATASETS="$*"
cd "$(dirname "$0")"
numbers=$(coldctl plan "$RUN" --config "$SUITE")
NUMBER=${numbers%%[!0-9]*} # the first, if several are still to be made
export NUMBER
finetuning=$(sbatch --parsable --array="0-$(($# - 1))" finetune.sbatch)
sbatch --dependency="afterok:$finetuning" --kill-on-invalid-dep=yes fuse.sbatch
