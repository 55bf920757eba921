# What the job scripts share: sourced by them, in the folder that sbatch was called in (the repository's).
set -euo pipefail
[[ -f finetune_stage1.sh ]] || { echo "error: $PWD is not the repository: call sbatch there" >&2; exit 1; }

export NUM_MACHINES=${SLURM_JOB_NUM_NODES:-1}
export NUM_PROCESSES=${NUM_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_ADDRESS=${hosts%%$'\n'*}
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node get different ones

[[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over
source launch/find_python.sh

# USR1 comes some minutes before the time limit: the run saves, and the job goes back into the queue. TERM comes from
# preemption and from scancel: the run saves, and the job waits for SLURM to requeue or to cancel it. Were it to end by
# itself within the grace time, it would count as completed.
signal='' trainers=''
take_signal() {
  signal=$1 interrupted=1
  [[ -z "$trainers" ]] || kill -"$1" "$trainers" 2>/dev/null || true # srun passes it on to every machine
}
trap 'take_signal USR1' USR1
trap 'take_signal TERM' TERM

# Run a command; the job ends after it where it failed or a signal came.
run() {
  local status=0 command
  "$@" &
  command=$!
  if [[ "$1" = srun ]]; then # a converter is not stopped: it takes seconds
    trainers=$command
    [[ -z "$signal" ]] || kill -"$signal" "$trainers"
  fi
  interrupted=1
  while [[ $interrupted = 1 ]]; do # a signal interrupts `wait`, whose status is then not the command's
    interrupted=0
    wait "$command" && status=0 || status=$?
  done
  trainers=''
  if [[ "$signal" = USR1 ]]; then # whatever the status: a run that was still starting has nothing to save
    echo "the time limit is near: job $SLURM_JOB_ID goes back into the queue and will resume"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  [[ "$signal" != TERM ]] || exec sleep infinity
  [[ $status = 0 ]] || exit "$status"
}
