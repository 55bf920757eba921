#!/usr/bin/env bash
# Learning is real: a small VAE and stage 1 from scratch, then scores on held-out videos beside its own start and the
# plain ways to fill a hole. About half an hour on two CPU cores. DAVIS_ROOT and YTVOS_ROOT may name real videos, to which
# drawn ones are added.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
run=${RUN:-demo/learn}
size=${SIZE:-small}
mkdir -p "$run/data"
"$PYTHON" -m demo.make_videos --output_dir "$run/drawn" --more "${DRAWN_VIDEOS:-60}" --seed 1
"$PYTHON" -m demo.make_weights --output_dir "$run/weights" --size "$size"

# One dataset of both kinds: links to the drawn videos and, where they are given, to the real ones.
data=$(realpath "$run/data")
mkdir -p "$data/YTBV/JPEGImages" "$data/DAVIS/JPEGImages/480p" "$data/DAVIS/Annotations/480p" "$data/DAVIS/ImageSets/2017"
: >"$data/DAVIS/ImageSets/2017/train.txt"
: >"$data/DAVIS/ImageSets/2017/val.txt"
for root in ${DAVIS_ROOT:+"$DAVIS_ROOT"} "$run/drawn/DAVIS"; do
  ln -sfn "$(realpath "$root")"/JPEGImages/480p/* "$data/DAVIS/JPEGImages/480p/"
  ln -sfn "$(realpath "$root")"/Annotations/480p/* "$data/DAVIS/Annotations/480p/"
  for list in train val; do cat "$root/ImageSets/2017/$list.txt" >>"$data/DAVIS/ImageSets/2017/$list.txt"; done
done
for root in ${YTVOS_ROOT:+"$YTVOS_ROOT"} "$run/drawn/YTBV"; do
  ln -sfn "$(realpath "$root")"/JPEGImages/* "$data/YTBV/JPEGImages/"
done

export PYTHON WEIGHTS=$run/weights DAVIS_ROOT=$data/DAVIS YTVOS_ROOT=$data/YTBV PRETRAINED_STAGE1_PATH=
export RESOLUTION=${RESOLUTION:-32} NFRAMES=${NFRAMES:-2} TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-4}
export RESUME_FROM_CHECKPOINT= CHECKPOINTING_STEPS=100000
"$PYTHON" -m demo.train_vae --weights "$WEIGHTS" --davis_root "$DAVIS_ROOT" --ytvos_root "$YTVOS_ROOT" \
  --resolution "$RESOLUTION" --batch_size 16 --steps "${VAE_STEPS:-700}"

# The start: what the run below begins with, as folders.
LOG=$run/start.log OUTPUT_DIR=$run/start MAX_TRAIN_STEPS=1 LEARNING_RATE=1e-12 VALIDATION_STEPS=0 \
  bash finetune_stage1.sh --report_to=none
LOG=$run/stage1.log OUTPUT_DIR=$run/stage1 MAX_TRAIN_STEPS=${STEPS:-2500} LEARNING_RATE=${LEARNING_RATE:-1e-3} \
  VALIDATION_STEPS=${VALIDATION_STEPS:-1250} bash finetune_stage1.sh --lr_scheduler=cosine --lr_warmup_steps=100 --logging_steps=25
"$PYTHON" -m libs.report "$run/stage1"
models=(--base_model_name_or_path "$WEIGHTS/stable-diffusion-v1-5" --vae_path "$WEIGHTS/sd-vae-ft-mse")
"$PYTHON" eval_DiffuEraser.py --frames "$DAVIS_ROOT/JPEGImages/480p" --videos "$DAVIS_ROOT/ImageSets/2017/val.txt" \
  "${models[@]}" --weights "$run/stage1" --baseline "$run/start" --size "${EVAL_SIZE:-56x32}" --nframes 30 \
  --output_dir "$run/evaluation"
