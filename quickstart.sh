#!/usr/bin/env bash
# The whole workflow on tiny random weights and drawn videos: a few minutes on two CPU cores, nothing to download but
# the Python packages. Then the same commands run with real weights and data.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail
[[ $# -eq 0 ]] || { echo "error: $0 takes no arguments, and $* was given" >&2; exit 1; }
cd "$(dirname "${BASH_SOURCE[0]}")"
bash install.sh
python=.venv/bin/python
unset VIRTUAL_ENV CONDA_PREFIX

run=toy/run
rm -rf "$run"
mkdir -p "$run"
"$python" -m toy.make_weights --output_dir toy/weights
"$python" -m toy.make_videos --output_dir toy/data

# What the scripts read from the environment, at sizes for a CPU and at a learning rate for random weights.
source toy/unset_settings.sh
export PYTHON=$python WEIGHTS=toy/weights DAVIS_ROOT=toy/data/DAVIS YTVOS_ROOT=toy/data/YTBV
export RESOLUTION=64 DATALOADER_NUM_WORKERS=0 LEARNING_RATE=1e-3 CHECKPOINTING_STEPS=50 VALIDATION_STEPS=100
export RESUME_FROM_CHECKPOINT= LATENT_CACHE=$run/latent-cache
export COMPILE=0 # it would take longer than the run

LOG=$run/finetune-stage1.log OUTPUT_DIR=$run/finetune-stage1 MAX_TRAIN_STEPS=100 bash finetune_stage1.sh --probe_clips=8
"$python" save_checkpoint_stage1.py --input_dir "$run/finetune-stage1" --output_dir "$run/finetuned-stage1"
PRETRAINED_STAGE1=$run/finetuned-stage1 \
  LOG=$run/finetune-stage2.log OUTPUT_DIR=$run/finetune-stage2 MAX_TRAIN_STEPS=100 bash finetune_stage2.sh --probe_clips=8
"$python" save_checkpoint_stage2.py --input_dir "$run/finetune-stage2" --output_dir "$run/finetuned-stage2" \
  --pretrained_stage1 "$run/finetuned-stage1"

for stage in 1 2; do "$python" -m libs.report "$run/finetune-stage$stage" >/dev/null; done
echo
grep -h "of its start" "$run"/finetune-stage1.log | tail -n 1 | sed 's/^.*held-out/stage 1: held-out/'
grep -h "of its start" "$run"/finetune-stage2.log | tail -n 1 | sed 's/^.*held-out/stage 2: held-out/'
cat <<EOF
logs              $run/finetune-stage1.log, $run/finetune-stage2.log
report pages      $run/finetune-stage1/report.html, $run/finetune-stage2/report.html
validation GIFs   $run/finetune-stage1/logs-finetune-stage1/samples/, $run/finetune-stage2/logs-finetune-stage2/samples/
                  (random weights paint noise; the real ones paint pictures)
final folders     $run/finetuned-stage2/unet_main, $run/finetuned-stage2/brushnet
EOF
