"""Runs killed at random moments, some in the middle of writing a checkpoint, end bit for bit as undisturbed ones."""

import os
import random
import re
import time

from conftest import equal_files
from forked import finish, start

from libs.checkpoints.checkpoint import OLD_SUFFIX
from train_DiffuEraser_stage1 import main

KILLS = int(os.environ.get("KILLS", 5))
WEIGHTS = "unet_main/diffusion_pytorch_model.safetensors"


def kill_at_random(process, output, run, rng):
    """SIGKILL the trainer after some steps, or when it is writing a checkpoint; False if it ended before."""
    lines = []
    wanted = rng.randint(0, 3)
    for line in output:
        lines.append(line)
        if re.search(r"step \d+/", line):
            if wanted == 0:
                break
            wanted -= 1
    if rng.random() < 0.6:  # aim at the next checkpoint: while its folder has the name it is written under
        while process.is_alive() and not list(run.glob("*.partial")):
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.08)
    else:
        time.sleep(rng.random() * 0.3)
    alive = process.is_alive()
    in_write = bool(list(run.glob("*.partial")))
    process.kill()
    with output:
        lines += output.readlines()
    process.join()
    assert not any("Traceback" in line or "error:" in line for line in lines), "".join(lines)
    return alive, in_write


def test_killed_runs_lose_nothing(flags, tmp_path):
    rng = random.Random(0)
    steps = 3 * KILLS + 6
    settings = {"max_train_steps": steps, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(*start(main, flags(1, output_dir=whole, **{**settings, "checkpointing_steps": steps})))

    arguments = flags(1, output_dir=run, resume_from_checkpoint="latest", **settings)
    kills, in_writes = 0, 0
    while kills < KILLS:
        alive, in_write = kill_at_random(*start(main, arguments), run, rng)
        if not alive:
            break
        kills, in_writes = kills + 1, in_writes + in_write
    finish(*start(main, arguments))
    print(f"{kills} kills, {in_writes} of them while a checkpoint was written")
    assert kills == KILLS and in_writes > 0
    assert equal_files(whole / WEIGHTS, run / WEIGHTS)
    assert equal_files(whole / f"checkpoint-{steps}/model.safetensors", run / f"checkpoint-{steps}/model.safetensors")
    assert not list(run.glob("*.partial")) and not list(run.glob(f"*{OLD_SUFFIX}"))
