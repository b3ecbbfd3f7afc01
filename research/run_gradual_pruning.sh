#!/usr/bin/env bash
# Gradual pruning while a model trains. As it stands: digits, in two minutes on a CPU.
# What stands before the command changes it:
#   DATA_DIR=/data/imagenet CONFIG=research/configs/deit.yaml MODEL=deit_small_patch16_224 \
#   RECIPE=recipes/vit/cap-gradual-90.yaml NUM_PROC=8 \
#       research/run_gradual_pruning.sh --pretrained --amp --amp-dtype bfloat16
# and what stands after it is passed on. After an interruption: the same command with --resume.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-digits_vit}
CONFIG=${CONFIG:-research/configs/digits.yaml}
NUM_PROC=${NUM_PROC:-1} # processes, one for each GPU

"${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$NUM_PROC" \
    research/sparse_training.py \
    --data-dir "${DATA_DIR:-digits}" \
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
