#!/usr/bin/env bash
# Stage 2: motion modules. Arguments are passed on to train_DiffuEraser_stage2.py; README.md lists the variables.
stage=2
source "$(dirname "${BASH_SOURCE[0]}")/launch/launch.sh"

launch \
  --pretrained_stage1="${PRETRAINED_STAGE1:-converted_weights/finetuned-stage1}" \
  --motion_adapter_path="${MOTION_ADAPTER:-$WEIGHTS/animatediff-motion-adapter-v1-5-2}" \
  --nframes="${NFRAMES:-22}" \
  "$@"
