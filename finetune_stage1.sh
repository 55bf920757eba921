#!/usr/bin/env bash
# Stage 1: UNet2D and BrushNet. Arguments are passed on to train_DiffuEraser_stage1.py; README.md lists the variables.
stage=1
source "$(dirname "${BASH_SOURCE[0]}")/launch/launch.sh"

launch \
  --pretrained_stage1_path="${PRETRAINED_STAGE1_PATH-$WEIGHTS/diffuEraser}" \
  --nframes="${NFRAMES:-10}" \
  "$@"
