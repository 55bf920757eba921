"""The job scripts under stand-ins for SLURM's commands, which run them here: two machines are two processes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, wait_for_line

SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" &
  tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do
  wait "$task"
  status=$?
  while ((status > 128)) && kill -0 "$task" 2>/dev/null; do
    wait "$task"
    status=$?
  done
  ((status > worst)) && worst=$status
done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) echo localhost; echo elsewhere ;;
  requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""


@pytest.fixture
def environment(weights, videos, tmp_path):
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    return {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_ID": "1234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost,elsewhere",
        "SLURM_GPUS_ON_NODE": "1", "PYTHON": sys.executable, "WEIGHTS": str(weights), "RESOLUTION": "32",
        "DAVIS_ROOT": str(videos / "DAVIS"), "YTVOS_ROOT": str(videos / "YTBV"), "NFRAMES": "2",
        "MAX_TRAIN_STEPS": "5000", "VALIDATION_STEPS": "0", "DATALOADER_NUM_WORKERS": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """A folder of links to the repository's files: logs, checkpoints and converted folders of a job stay in it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for path in REPOSITORY.iterdir():
        if path.suffix in (".py", ".sh") or path.name in ("common", "configs", "dataset", "launch", "libs", "slurm"):
            (folder / path.name).symlink_to(path)
    return folder


def sbatch(stage, checkout, environment, *flags, signal_at=None):
    """(status, output) of a job; with the signal that its header asks for when its log holds `signal_at`."""
    header = Path(checkout, "slurm/finetune.sbatch").read_text()
    assert "#SBATCH --requeue\n" in header and "#SBATCH --ntasks-per-node=1\n" in header
    number = signal.Signals["SIG" + re.search(r"#SBATCH --signal=B:(\w+)@\d+\n", header)[1]]
    job = subprocess.Popen(
        ["bash", "slurm/finetune.sbatch", "--logging_steps=1", "--report_to=none", *flags],
        cwd=checkout, env={**environment, "STAGE": stage}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        if signal_at:
            wait_for_line(checkout / "finetune-stage1.log", signal_at)
            job.send_signal(number)
        output, _ = job.communicate(timeout=400)
    finally:
        job.kill()
    return job.returncode, output


def test_both_stages_in_one_job_that_is_requeued(checkout, environment):
    """Near the time limit it saves and goes back into the queue; started again it resumes and does both stages."""
    environment["OUTPUT_DIR"] = "experiment"
    status, output = sbatch("both", checkout, environment, signal_at="step 2/5000")
    log = Path(checkout, "finetune-stage1.log")
    assert status == 0 and "job 1234 goes back into the queue" in output, output + log.read_text()
    assert Path(environment["REQUEUED"]).read_text() == "1234\n"
    assert (
        "stage 1 on cpu, 2 process(es) (MULTI_CPU)" in log.read_text()
        and "stopped by SIGUSR1 at step" in log.read_text()
    )
    (checkpoint,) = checkout.glob("experiment/finetune-stage1/checkpoint-*")
    assert not Path(checkout, "experiment/converted_weights").exists()

    # The queue may give it fewer machines: with the same global batch the run goes on as before.
    environment |= {"SLURM_JOB_NUM_NODES": "1", "GRADIENT_ACCUMULATION_STEPS": "2"}
    environment["MAX_TRAIN_STEPS"] = str(int(checkpoint.name.partition("-")[2]) + 2)
    status, output = sbatch("both", checkout, environment)
    assert status == 0, output + log.read_text()
    assert "num_processes from 2 to 1" in log.read_text() and "resumed from" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert Path(environment["REQUEUED"]).read_text() == "1234\n"
    for model in ("unet_main", "brushnet"):
        assert Path(checkout, "experiment/converted_weights/finetuned-stage2", model, "config.json").is_file()
    assert Path(checkout, "finetune-stage1-machine1.log").is_file()  # what the second machine has to say


def test_a_job_that_fails_is_not_requeued(checkout, environment):
    environment |= {"SLURM_JOB_NUM_NODES": "1", "WEIGHTS": "/no/weights"}
    status, output = sbatch("1", checkout, environment)
    assert status == 1 and "error: /no/weights" in output and not Path(environment["REQUEUED"]).exists()


def test_a_wrong_stage_is_one_line(checkout, environment):
    status, output = sbatch("3", checkout, environment)
    assert status == 1 and output == "error: STAGE=3: 1, 2 or both was needed\n"


def test_a_folder_that_the_job_does_not_know_is_one_line(checkout, environment):
    status, output = sbatch("1", checkout, environment, "--output_dir=elsewhere")
    assert status == 1 and output == "error: --output_dir=elsewhere: OUTPUT_DIR was needed instead\n"
