#!/usr/bin/env bash
# One-shot pruning of a model to several sparsities. As it stands: digits, in a minute on a CPU.
# What stands before the command changes it:
#   DATA_DIR=/data/imagenet MODEL=deit_small_patch16_224 NUM_PROC=8 research/run_one_shot_pruning.sh
# and what stands after it is passed on: research/run_one_shot_pruning.sh --save-model --log-wandb
set -euo pipefail

# paths are those of the folder it is called from, or else of the repository
from_here() { if [[ $1 != digits && -e $PWD/$1 ]]; then echo "$PWD/$1"; else echo "$1"; fi; }
DATA_DIR=$(from_here "${DATA_DIR:-digits}")
RECIPE=$(from_here "${RECIPE:-recipes/vit/cap-one-shot-50.yaml}")
cd "$(dirname "$0")/.."

MODEL=${MODEL:-digits_vit}
EXPERIMENT=${EXPERIMENT:-$MODEL}
SPARSITIES=${SPARSITIES:-0.5 0.6 0.75 0.9}
NUM_PROC=${NUM_PROC:-1} # processes, one for each GPU

# SPARSITIES are several words
# shellcheck disable=SC2086
"${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$NUM_PROC" \
    -m research.one_shot_pruning \
    --data-dir "$DATA_DIR" \
    --recipe "$RECIPE" \
    --model "$MODEL" \
    --experiment "$EXPERIMENT" \
    -gb "${GRAD_BATCH_SIZE:-16}" \
    -vb "${VAL_BATCH_SIZE:-256}" \
    --workers "${WORKERS:-8}" \
    --sparsities $SPARSITIES \
    "$@"
