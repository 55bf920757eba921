# What finetune_stage1.sh and finetune_stage2.sh share: sourced by them with `stage` set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/find_python.sh

WEIGHTS=${WEIGHTS:-weights}
DAVIS_ROOT=${DAVIS_ROOT-dataset/DAVIS}
YTVOS_ROOT=${YTVOS_ROOT-dataset/YTBV}
OUTPUT_DIR=${OUTPUT_DIR:-finetune-stage$stage}

# What the user's own engine configuration says of KEY; nothing where there is no such file, line or value.
configured() {
  [[ -f "${ACCELERATE_CONFIG:-}" ]] || return 0
  sed -nE "s/^$1: *['\"]?([^'\"[:space:]]+).*/\1/p" "$ACCELERATE_CONFIG" | grep -vx null || true
}

MACHINE_RANK=${MACHINE_RANK:-${SLURM_NODEID:-$(configured machine_rank)}}
MACHINE_RANK=${MACHINE_RANK:-0}
[[ "$MACHINE_RANK" = 0 ]] && machine= || machine=-machine$MACHINE_RANK # the first machine's log is the run's
LOG=${LOG:-finetune-stage$stage$machine.log}

# The first two held-out DAVIS videos that have masks: sets `images` and `masks`.
find_validation_videos() {
  local names=() name
  images=() masks=()
  [[ -f "$DAVIS_ROOT/ImageSets/2017/val.txt" ]] && mapfile -t names <"$DAVIS_ROOT/ImageSets/2017/val.txt"
  for name in "${names[@]//$'\r'/}"; do
    if [[ -n "$name" && -d "$DAVIS_ROOT/JPEGImages/480p/$name" && -d "$DAVIS_ROOT/Annotations/480p/$name" ]]; then
      images+=("$DAVIS_ROOT/JPEGImages/480p/$name")
      masks+=("$DAVIS_ROOT/Annotations/480p/$name")
    fi
    [[ ${#images[@]} -lt 2 ]] || break
  done
}

python_list() { "$PYTHON" -c 'import sys; print(sys.argv[1:])' "$@"; }

fail() {
  echo "error: $*" >&2
  exit 1
}

# One line for what would otherwise end in accelerate's usage or in bash's own words, or be taken for something else.
check_variables() {
  local name
  for name in NUM_PROCESSES NUM_MACHINES OMP_NUM_THREADS; do
    [[ "${!name:-1}" =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: a number above 0 was needed"
  done
  [[ "$MACHINE_RANK" =~ ^[0-9]+$ ]] || fail "MACHINE_RANK=$MACHINE_RANK: a number from 0 on was needed"
  for name in LOW_MEMORY COMPILE CUDA_GRAPH; do
    [[ "${!name:-0}" =~ ^[01]$ ]] || fail "$name=${!name}: 0 or 1 was needed"
  done
  [[ "${MIXED_PRECISION:-no}" =~ ^(no|fp16|bf16)$ ]] ||
    fail "MIXED_PRECISION=$MIXED_PRECISION: no (fp32), fp16 or bf16 was needed"
  command -v "$PYTHON" >/dev/null || fail "$PYTHON was not found: bash install.sh requirements.txt makes .venv"
  mkdir -p "$(dirname "$LOG")" 2>/dev/null || fail "LOG=$LOG cannot be written to: choose another"
}

# Sets `engine`: the arguments that tell accelerate its configuration, and how many processes it starts where; besides
# `can_graph`, and `can_compile` where the engine cannot. Variables come before the user's own configuration, and that
# before the defaults: one process, or all GPUs where a configuration was chosen that leaves their number open.
choose_engine() {
  local config=${ACCELERATE_CONFIG:-} alone=configs/accelerate/one_gpu.yaml machines processes= per_machine=1
  machines=${NUM_MACHINES:-$(configured num_machines)}
  machines=${machines:-1}
  [[ -n "$config" && $gpus -gt 1 ]] && per_machine=$gpus
  [[ -n "${NUM_PROCESSES:-}" ]] || processes=$(configured num_processes)
  processes=${processes:-$((${NUM_PROCESSES:-$per_machine} * machines))}
  per_machine=$((processes / machines))
  if [[ -z "$config" ]]; then
    config=one_gpu
    [[ "$processes" -gt 1 ]] && config=multi_gpu
    [[ "$machines" -gt 1 ]] && config=multi_node
    config=configs/accelerate/$config.yaml
  fi
  [[ -f "$config" ]] || fail "$config is no file: ACCELERATE_CONFIG must be one of $(echo configs/accelerate/*.yaml)"
  if grep -q '^distributed_type: DEEPSPEED' "$config" &&
    ! "$PYTHON" -c 'import importlib.util as i, sys; sys.exit(i.find_spec("deepspeed") is None)'; then
    fail "$config needs DeepSpeed, which is not installed: pip install deepspeed, or use configs/accelerate/fsdp.yaml"
  fi
  if grep -q '^distributed_type: \(FSDP\|DEEPSPEED\)' "$config"; then # their layers gather weights as they go
    can_compile=0
    # Which leaves holes in the allocator's memory: fp32 ran out of 80 GB for them, with 25 GiB in use.
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
  fi
  can_graph=$((processes == 1))
  engine=(--config_file="$config" --num_processes="$processes" --num_machines="$machines" --dynamo_backend=no)
  if [[ "$machines" -gt 1 ]]; then
    local address=${MAIN_ADDRESS:-$(configured main_process_ip)}
    [[ -n "$address" ]] || fail "NUM_MACHINES=$machines needs MAIN_ADDRESS, the first machine's name or address"
    [[ "$MACHINE_RANK" -lt "$machines" ]] ||
      fail "MACHINE_RANK=$MACHINE_RANK: a number from 0 to $((machines - 1)) was needed, another on every machine"
    engine+=(--machine_rank="$MACHINE_RANK" --main_process_ip="$address")
  fi
  if [[ "$config" != "$alone" ]]; then # port 0: any that is free, so that two runs may share a machine
    local port=${MAIN_PORT:-$(configured main_process_port)}
    engine+=(--main_process_port="${port:-$([[ "$machines" = 1 ]] && echo 0 || echo 29500)}")
  fi
  if [[ $has_gpu = 0 ]]; then
    [[ "$config" = "$alone" ]] && engine+=(--cpu)
    engine+=(--num_cpu_threads_per_process="${OMP_NUM_THREADS:-$((($(nproc) + per_machine - 1) / per_machine))}")
  fi
}

launch() {
  check_variables
  local has_gpu can_compile gpus
  read -r has_gpu can_compile gpus < <("$PYTHON" -m common.hardware)
  [[ "$(configured use_cpu)" = [Tt]rue ]] && has_gpu=0 can_compile=0 gpus=0
  local precision=${MIXED_PRECISION:-$(configured mixed_precision)}
  precision=${precision:-$([[ $has_gpu = 1 ]] && echo fp16 || echo no)}

  local engine can_graph
  choose_engine

  local options=(
    --base_model_name_or_path="$WEIGHTS/stable-diffusion-v1-5"
    --vae_path="$WEIGHTS/sd-vae-ft-mse"
    --davis_root="$DAVIS_ROOT"
    --ytvos_root="$YTVOS_ROOT"
    --resolution="${RESOLUTION:-512}"
    --train_batch_size="${TRAIN_BATCH_SIZE:-1}"
    --gradient_accumulation_steps="${GRADIENT_ACCUMULATION_STEPS:-1}"
    --learning_rate="${LEARNING_RATE:-5e-06}"
    --checkpointing_steps="${CHECKPOINTING_STEPS:-2000}"
    --validation_steps="${VALIDATION_STEPS:-2000}"
    --resume_from_checkpoint="${RESUME_FROM_CHECKPOINT-latest}"
    --logging_dir="logs-finetune-stage$stage"
    --output_dir="$OUTPUT_DIR"
    --latent_cache="${LATENT_CACHE-latent-cache}"
  )
  if [[ "${LOW_MEMORY:-0}" = 1 ]]; then
    options+=(--gradient_checkpointing --use_8bit_adam)
    can_compile=0
  fi
  local compile=${COMPILE:-$can_compile}
  [[ "$compile" = 1 ]] && options+=(--compile)
  [[ "${CUDA_GRAPH:-$((compile * can_graph))}" = 1 ]] && options+=(--cuda_graph)
  [[ -n "${DATALOADER_NUM_WORKERS:-}" ]] && options+=(--dataloader_num_workers="$DATALOADER_NUM_WORKERS")
  [[ -n "${MAX_TRAIN_STEPS:-}" ]] && options+=(--max_train_steps="$MAX_TRAIN_STEPS")
  [[ -n "${CHECKPOINTS_TOTAL_LIMIT:-}" ]] && options+=(--checkpoints_total_limit="$CHECKPOINTS_TOTAL_LIMIT")
  [[ -n "${SEED:-}" ]] && options+=(--seed="$SEED")

  local images masks note=
  find_validation_videos
  if [[ ${#images[@]} -gt 0 ]]; then
    options+=(--validation_image="$(python_list "${images[@]}")" --validation_mask="$(python_list "${masks[@]}")")
  else
    [[ " $* " == *" --validation_image"* ]] ||
      note="validation is off: ${DAVIS_ROOT:-DAVIS_ROOT, which is empty,} has no ImageSets/2017/val.txt that names videos with Annotations/480p/;"
    note=${note:+"$note add them, or pass --validation_image and --validation_mask"}
  fi

  local command=(accelerate launch "${engine[@]}" --mixed_precision="$precision"
    "train_DiffuEraser_stage$stage.py" "${options[@]}" "$@")
  if [[ " $* " == *" --check_only "* || " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    exec "$PYTHON" -m launch.launcher "${command[@]:2}"
  fi
  local lines_before=0
  [[ -f "$LOG" ]] && lines_before=$(wc -l <"$LOG")
  {
    echo "===== $(date '+%Y-%m-%d %H:%M:%S') stage $stage"
    echo "command:$(printf ' %q' "${command[@]}")"
    [[ -n "$note" ]] && echo "$note"
  } >>"$LOG"
  echo "stage $stage: training, log in $LOG (tail -f $LOG), checkpoints in $OUTPUT_DIR/${note:+; $note}"

  # The shell takes the signals and passes the first on, as USR1, to the trainers, which save and end. The launchers in
  # between inherit that they are ignored: they would end at once and leave the trainers alone. A second signal ends all.
  trap '' INT TERM HUP USR1
  export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # torch warns of hosts without a reverse name, for one
  PYTHONUNBUFFERED=1 setsid "$PYTHON" -m launch.launcher "${command[@]:2}" >>"$LOG" 2>&1 &
  child=$!
  trap stop_trainer INT TERM HUP USR1
  local status=0 stopped_early=0
  interrupted=1
  while [[ $interrupted = 1 ]]; do # a signal interrupts `wait`, whose status is then not the trainer's
    interrupted=0
    { wait "$child" && status=0 || status=$?; } 2>/dev/null # bash would say "Killed", with the whole command
  done
  if [[ $stopped_early = 1 ]]; then
    echo "stopped before training began: there was nothing to save"
  elif [[ $status != 0 ]]; then
    echo "stage $stage failed with status $status; the end of $LOG:" >&2
    tail -n +$((lines_before + 1)) "$LOG" | grep -v '^error' | tail -n 15 >&2 || true
    tail -n +$((lines_before + 1)) "$LOG" | grep '^error' >&2 || true
  fi
  exit $status
}

stop_trainer() {
  interrupted=1
  trap 'interrupted=1; signal_all KILL' INT TERM HUP USR1
  # No pipe: grep ends at the first match, and `tail` would fail for that in a long log.
  if grep -q " stage $stage on " <(tail -n +$((lines_before + 1)) "$LOG"); then
    echo "stopping: the step is finished and saved (a second signal ends at once)"
    signal_all USR1
  else
    stopped_early=1
    signal_all KILL
  fi
}

# Every process below the launcher: with several GPUs the trainers are in sessions of their own.
signal_all() {
  local pids=("$child") i
  for ((i = 0; i < ${#pids[@]}; i++)); do
    pids+=($(cat /proc/"${pids[i]}"/task/*/children 2>/dev/null || pgrep -P "${pids[i]}" || true))
  done
  kill -"$1" "${pids[@]}" 2>/dev/null || true
}
