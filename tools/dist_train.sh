#!/usr/bin/env bash
# Trains a recipe of mmdetection or mmsegmentation on all GPUs of a machine, or of several:
#     tools/dist_train.sh CONFIG.py [option of their train.py]...
# On each of several machines: NODES=2 RANK=0 (0, 1, ... one per machine) MAIN=ADDRESS (of the first) tools/dist_train.sh ...
# GPUS sets how many of a machine's GPUs are used, PORT the port at which machines meet.
set -euo pipefail

config=${1:?expected a config of configs/mmdet or configs/mmseg; see the head of $0}
case $config in
*mmdet/*) framework=mmdet ;;
*mmseg/*) framework=mmseg ;;
*) framework=${FRAMEWORK:?expected FRAMEWORK=mmdet or FRAMEWORK=mmseg for a config in neither folder} ;;
esac
exec torchrun \
    --nnodes "${NODES:-1}" \
    --node-rank "${RANK:-0}" \
    --nproc-per-node "${GPUS:-gpu}" \
    --master-addr "${MAIN:-127.0.0.1}" \
    --master-port "${PORT:-29500}" \
    -m vssm.openmmlab "$framework/train.py" "$config" --launcher pytorch "${@:2}"
