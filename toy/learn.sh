#!/usr/bin/env bash
# Learning is real: a small VAE and both stages from scratch, then scores on held-out videos beside the run's own start
# and the plain ways to fill a hole. About 20 minutes on a GPU; on a CPU core a smaller model takes 40.
# DAVIS_ROOT and YTVOS_ROOT may name real videos, to which drawn ones are added.
set -euo pipefail
[[ $# -eq 0 ]] || { echo "error: $0 takes no arguments, and $* was given" >&2; exit 1; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=${RUN:-toy/learn}
[[ ! -e "$run/start" ]] || {
  echo "error: $run holds an earlier run: remove it, or set RUN to another folder" >&2
  exit 1
}
source toy/unset_settings.sh DAVIS_ROOT YTVOS_ROOT RESOLUTION LEARNING_RATE
export PYTHON=${PYTHON:-.venv/bin/python}
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  : "${SIZE:=medium}" "${RESOLUTION:=64}" "${VAE_STEPS:=3000}" "${LEARNING_RATE:=5e-4}"
  : "${STAGE1_STEPS:=700}" "${STAGE1_CLIPS:=64}" "${STAGE1_FRAMES:=4}" "${DRAWN_VIDEOS:=100}"
  : "${STAGE2_STEPS:=250}" "${STAGE2_CLIPS:=4}" "${STAGE2_FRAMES:=22}"
else
  : "${SIZE:=small}" "${RESOLUTION:=32}" "${VAE_STEPS:=700}" "${LEARNING_RATE:=1e-3}"
  : "${STAGE1_STEPS:=2500}" "${STAGE1_CLIPS:=4}" "${STAGE1_FRAMES:=2}" "${DRAWN_VIDEOS:=60}"
  : "${STAGE2_STEPS:=600}" "${STAGE2_CLIPS:=1}" "${STAGE2_FRAMES:=22}"
fi
"$PYTHON" -m toy.make_videos --output_dir "$run/drawn" --more "$DRAWN_VIDEOS" --seed 1
"$PYTHON" -m toy.make_weights --output_dir "$run/weights" --size "$SIZE"

# One dataset of both kinds: links to the drawn videos and, where they are given, to the real ones.
data=$run/data
"$PYTHON" -m toy.join_videos --output_dir "$data" --davis_roots ${DAVIS_ROOT:+"$DAVIS_ROOT"} "$run/drawn/DAVIS" \
  --ytvos_roots ${YTVOS_ROOT:+"$YTVOS_ROOT"} "$run/drawn/YTBV"

export WEIGHTS=$run/weights DAVIS_ROOT=$data/DAVIS YTVOS_ROOT=$data/YTBV PRETRAINED_STAGE1_PATH=
export RESOLUTION LEARNING_RATE RESUME_FROM_CHECKPOINT= CHECKPOINTING_STEPS=100000 COMPILE=0
export LATENT_CACHE= # frames this small are encoded as fast as they are looked up
"$PYTHON" -m toy.train_vae --weights "$WEIGHTS" --davis_root "$DAVIS_ROOT" --ytvos_root "$YTVOS_ROOT" \
  --resolution "$RESOLUTION" --batch_size 16 --steps "$VAE_STEPS"

flags=(--lr_scheduler=cosine --lr_warmup_steps=100 --logging_steps=25)
export NFRAMES=$STAGE1_FRAMES TRAIN_BATCH_SIZE=$STAGE1_CLIPS
# The start: what the run below begins with, as folders.
LOG=$run/start.log OUTPUT_DIR=$run/start MAX_TRAIN_STEPS=1 LEARNING_RATE=1e-12 VALIDATION_STEPS=0 \
  bash finetune_stage1.sh --report_to=none
LOG=$run/stage1.log OUTPUT_DIR=$run/stage1 MAX_TRAIN_STEPS=$STAGE1_STEPS \
  VALIDATION_STEPS=$STAGE1_STEPS bash finetune_stage1.sh "${flags[@]}"
NFRAMES=$STAGE2_FRAMES TRAIN_BATCH_SIZE=$STAGE2_CLIPS PRETRAINED_STAGE1=$run/stage1 \
  LOG=$run/stage2.log OUTPUT_DIR=$run/stage2 MAX_TRAIN_STEPS=$STAGE2_STEPS \
  VALIDATION_STEPS=$STAGE2_STEPS bash finetune_stage2.sh "${flags[@]}"
for stage in 1 2; do "$PYTHON" -m libs.report "$run/stage$stage"; done

evaluate() { # WEIGHTS BASELINE and further arguments
  "$PYTHON" eval_DiffuEraser.py --frames "$DAVIS_ROOT/JPEGImages/480p" --videos "$DAVIS_ROOT/ImageSets/2017/val.txt" \
    --base_model_name_or_path "$WEIGHTS/stable-diffusion-v1-5" --vae_path "$WEIGHTS/sd-vae-ft-mse" \
    --weights "$run/$1" --compare_with "$run/$2" --size "$((RESOLUTION * 7 / 4))x$RESOLUTION" \
    --output_dir "$run/evaluation-$1" "${@:3}"
}
evaluate stage1 start --nframes 30
evaluate stage2 stage1 --nframes "$STAGE2_FRAMES" --baselines
