"""Checkpoints: a run that is stopped and resumed ends bit for bit as one that was not."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import BF16, equal_files, reset_accelerate
from safetensors import safe_open

import common.files
from common.files import write_json
from libs.checkpoints.checkpoint import TrainerState, find_latest
from libs.inpainter import ClipInpainter
from libs.training.setup import resume


def final(folder):
    return folder / "unet_main" / "diffusion_pytorch_model.safetensors"


def losses(output):
    """{step: loss} of a log."""
    return {int(step): loss for step, loss in re.findall(r"step (\d+)/\d+  loss ([\d.]+)", output)}


@pytest.mark.parametrize(
    ("stage", "settings", "steps", "stop"),
    [
        (1, {}, 4, 2),
        (2, {"lr_scheduler": "cosine", "lr_warmup_steps": 1}, 4, 1),
        # an epoch has 44 clips: 22 batches of 2, 8 steps of 3 batches (the last of one): across the epoch's end
        (
            1,
            {"train_batch_size": 2, "gradient_accumulation_steps": 3, "nframes": 1, "dataloader_num_workers": 2},
            10,
            7,
        ),
        (1, {"train_batch_size": 22, "nframes": 1}, 5, 2),  # at an epoch's end
        (1, {"use_8bit_adam": True, "gradient_checkpointing": True}, 4, 2),
        (1, BF16, 4, 2),
        (2, BF16, 4, 2),
    ],
    ids=[
        "stage1",
        "stage2_schedule",
        "accumulation_workers_epoch",
        "at_epoch_end",
        "low_memory",
        "bf16_weights",
        "bf16_weights_stage2",
    ],
)
def test_resume_is_exact(train, tmp_path, capsys, stage, settings, steps, stop):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(stage, output_dir=whole, max_train_steps=steps, **settings)
    expected = losses(capsys.readouterr().out)
    assert sorted(expected) == list(range(1, steps + 1))

    # The same run once more, then all is taken away that a run killed after `stop` steps would not have.
    train(stage, output_dir=parts, max_train_steps=steps, checkpointing_steps=stop, **settings)
    for folder in parts.glob("checkpoint-*"):
        if folder.name != f"checkpoint-{stop}":
            shutil.rmtree(folder)
    first = losses(capsys.readouterr().out)
    train(
        stage,
        output_dir=parts,
        max_train_steps=steps,
        resume_from_checkpoint="latest",
        **{**settings, "dataloader_num_workers": 0},
    )
    resumed = losses(capsys.readouterr().out)
    assert sorted(resumed) == list(range(stop + 1, steps + 1))
    assert {**first, **resumed} == expected
    assert equal_files(final(whole), final(parts))
    checkpoint = f"checkpoint-{steps}/model.safetensors"
    assert equal_files(whole / checkpoint, parts / checkpoint)
    clips = steps * settings.get("train_batch_size", 1) * settings.get("gradient_accumulation_steps", 1)
    state = f"checkpoint-{steps}/trainer_state.json"
    assert [json.loads((folder / state).read_text())["clips_done"] for folder in (whole, parts)] == [clips, clips]


def test_rates_and_accumulation_start_anew_on_resuming(tmp_path, monkeypatch):
    """The flag decides on the rate, at the schedule's place; a step's passes are counted from its first one, which a
    checkpoint of another accumulation may not have been."""
    model = torch.nn.Linear(1, 1)

    def make(learning_rate):
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def load(folder):
        accelerator.step = 4
        for part, state in zip((optimizer, schedule), saved, strict=True):
            part.load_state_dict(state)

    earlier, earlier_schedule = make(1e-3)
    for _ in range(3):
        earlier.step()
        earlier_schedule.step()
    saved = earlier.state_dict(), earlier_schedule.state_dict()
    reset_accelerate()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    monkeypatch.setattr(accelerator, "load_state", load)
    optimizer, schedule = make(1e-5)
    found = SimpleNamespace(checkpoint=tmp_path, state=TrainerState(1, global_step=3, clips_done=12), dataset=range(5))
    resume(accelerator, optimizer, SimpleNamespace(scheduler=schedule), found)
    (group,) = optimizer.param_groups
    rates = group["lr"], *schedule.get_last_lr(), group["initial_lr"], *schedule.base_lrs
    assert rates == pytest.approx((1e-5 / 4, 1e-5 / 4, 1e-5, 1e-5), rel=1e-12)
    ends = []
    for _ in range(6):
        with accelerator.accumulate(model):
            ends.append(accelerator.sync_gradients)
    reset_accelerate()
    assert ends == [False, False, True] * 2


def test_limit_latest_and_incomplete_checkpoints(train, tmp_path, capsys):
    """The first and the last step are logged whatever --logging_steps; a run that has ended is converted again."""
    run = tmp_path / "run"
    train(1, max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2, logging_steps=3)
    assert sorted(losses(capsys.readouterr().out)) == [1, 3, 4]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    (run / "checkpoint-9").mkdir()
    (run / "checkpoint-7.partial").mkdir()
    latest, skipped = find_latest(run)
    assert latest == run / "checkpoint-3" and len(skipped) == 2
    capsys.readouterr()
    train(1, max_train_steps=5, resume_from_checkpoint="latest")
    output = capsys.readouterr().out
    assert "checkpoint-4 has no trainer_state.json" in output and "resumed from" in output
    assert sorted(losses(output)) == [4, 5]
    shutil.rmtree(run / "unet_main")
    train(1, max_train_steps=5, resume_from_checkpoint="latest")
    assert final(run).is_file()


def test_a_checkpoint_cut_short_is_passed_over(train, tmp_path, capsys):
    """At any of its files; given by name it is refused in one line, and nothing in the run's folder changes."""
    run = tmp_path / "run"
    train(1, max_train_steps=2, checkpointing_steps=1)
    newest = run / "checkpoint-2"
    names = sorted(path.name for path in newest.iterdir())
    assert {"model.safetensors", "optimizer.bin", "scheduler.bin", "trainer_state.json"} < set(names)
    for name in names:
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[:-10])
        latest, skipped = find_latest(run)
        assert latest == run / "checkpoint-1" and len(skipped) == 1 and name in skipped[0]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train(1, max_train_steps=3, resume_from_checkpoint="checkpoint-2")
        error = capsys.readouterr().err
        assert stop.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1 and name in error
        (newest / name).unlink()
        assert find_latest(run)[0] == run / "checkpoint-1"
        if name not in ("model.safetensors", "trainer_state.json"):  # weights are enough to convert
            assert find_latest(run, for_conversion=True)[0] == newest
        (newest / name).write_bytes(content)
    assert find_latest(run)[0] == newest and sorted(path.name for path in newest.iterdir()) == names


def test_stage_2_checkpoints_hold_only_what_trains(train, tmp_path):
    train(2, max_train_steps=1)
    with safe_open(tmp_path / "run/checkpoint-1/model.safetensors", framework="pt") as weights:
        assert all(key.startswith("unet_main.") and "motion_modules" in key for key in weights.keys())
    state = json.loads((tmp_path / "run/checkpoint-1/trainer_state.json").read_text())
    assert state["global_step"] == 1 and state["stage"] == 2


def test_validation_and_probe_do_not_change_training(train, tmp_path, videos, monkeypatch):
    monkeypatch.setattr(ClipInpainter, "inference_steps", 2)
    video = [str(videos / "DAVIS/JPEGImages/480p/buoy")]
    mask = [str(videos / "DAVIS/Annotations/480p/buoy")]
    train(2, output_dir=tmp_path / "plain", gradient_checkpointing=True)
    train(
        2,
        output_dir=tmp_path / "validated",
        gradient_checkpointing=True,
        validation_steps=1,
        validation_image=video,
        validation_mask=mask,
        probe_clips=2,
    )
    assert equal_files(final(tmp_path / "plain"), final(tmp_path / "validated"))
    gifs = sorted((tmp_path / "validated").rglob("*.gif"))
    assert [str(gif.relative_to(tmp_path / "validated")) for gif in gifs] == [
        "logs-finetune-stage2/samples/sample-1/1.gif",
        "logs-finetune-stage2/samples/sample-2/1.gif",
    ]


def test_resuming_stage_2_on_other_frozen_weights_is_refused(train, tmp_path, weights, capsys):
    train(1, output_dir=tmp_path / "stage1", max_train_steps=1)
    train(2, max_train_steps=1)
    with pytest.raises(SystemExit) as stop:
        train(2, pretrained_stage1=tmp_path / "stage1", max_train_steps=2, resume_from_checkpoint="latest")
    assert stop.value.code == 1
    assert "was written with weights of" in capsys.readouterr().err


def test_files_are_whole_or_as_before(tmp_path, monkeypatch):
    """Killed while it is written, a run's own file keeps what it held: the next start reads it."""
    write_json(tmp_path / "config.json", ["first"])

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(common.files, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "config.json", ["second"])
    assert json.loads((tmp_path / "config.json").read_text()) == ["first"]
    monkeypatch.undo()
    write_json(tmp_path / "config.json", ["second"])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
