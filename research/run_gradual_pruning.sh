#!/usr/bin/env bash
# Gradual pruning while a model trains. As it stands: digits, in two minutes on a CPU.
# What stands before the command changes it:
#   DATA_DIR=/data/imagenet CONFIG=research/configs/deit.yaml MODEL=deit_small_patch16_224 \
#   RECIPE=recipes/vit/cap-gradual-90.yaml NUM_PROC=8 \
#       research/run_gradual_pruning.sh --pretrained --amp --amp-dtype bfloat16
# and what stands after it is passed on. After an interruption: the same command with --resume.
set -euo pipefail

# paths are those of the folder it is called from, or else of the repository
from_here() { if [[ $1 != digits && -e $PWD/$1 ]]; then echo "$PWD/$1"; else echo "$1"; fi; }
DATA_DIR=$(from_here "${DATA_DIR:-digits}")
CONFIG=$(from_here "${CONFIG:-research/configs/digits.yaml}")
RECIPE=${RECIPE:+$(from_here "$RECIPE")}
cd "$(dirname "$0")/.."

MODEL=${MODEL:-digits_vit}
NUM_PROC=${NUM_PROC:-1} # processes, one for each GPU

"${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$NUM_PROC" \
    -m research.sparse_training \
    --data-dir "$DATA_DIR" \
    --config "$CONFIG" \
    ${RECIPE:+--recipe "$RECIPE"} \
    --model "$MODEL" \
    --experiment "${EXPERIMENT:-$MODEL}" \
    -vb "${VAL_BATCH_SIZE:-500}" \
    --workers "${WORKERS:-8}" \
    --log-param-histogram \
    --checkpoint-steps "${CHECKPOINT_STEPS:-1000}" \
    --timeout 18000 \
    "$@"
