"""What is checked before a run: --check_only's table, the GPU, memory, disk."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BF16, error_line

from common.errors import InputError
from libs.training import checks
from libs.training.config import parse_args, without_effect
from train_DiffuEraser_stage1 import Stage1


def test_settings_that_others_leave_without_effect(train, tmp_path, capsys):
    """In the log, and in the table."""
    changes = {"lr_warmup_steps": 10, "lr_power": 2.0, "loss_rim": 4, "prior": "median"}
    expected = [
        "--lr_warmup_steps=10 has no effect: --lr_scheduler=constant has no warm-up",
        "--lr_power=2.0 has no effect: --lr_scheduler=constant has no power",
        "--loss_rim=4 has no effect: --loss_weights are the same on the rim and in the rest",
        "--prior=median has no effect: only validation with --pcm_weights starts from one",
    ]
    train(1, max_train_steps=1, **changes)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 1)[1] for line in lines if "has no effect" in line] == expected
    with pytest.raises(SystemExit):
        train(1, check_only=True, output_dir=tmp_path / "other", **changes)
    assert "; ".join(expected) in capsys.readouterr().out.splitlines()[0]


def test_settings_that_have_an_effect(flags):
    changes = {"lr_scheduler": "polynomial", "lr_warmup_steps": 10, "lr_power": 2.0, "loss_weights": "4,2,1"}
    assert without_effect(parse_args(Stage1, flags(1, **changes, loss_rim=4))) == []


def test_check_only(train, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(1, check_only=True, scan_data=True)
    table = capsys.readouterr().out
    assert stop.value.code == 0 and table.count("  ok  ") == len(table.splitlines()) == 12
    assert "8 videos, 208 frames, 44 clips an epoch" in table
    with pytest.raises(SystemExit) as stop:
        train(2, check_only=True, davis_root="/no/DAVIS", pretrained_stage1="/no/weights")
    table = capsys.readouterr().out
    assert stop.value.code == 1 and table.count("FAILED") == 2
    with pytest.raises(SystemExit) as stop:
        train(1, check_only=True, output_dir="/proc/run")
    table = capsys.readouterr().out
    assert stop.value.code == 1 and "/proc/run cannot be written to" in table
    assert not list(Path(tmp_path, "run").glob("checkpoint-*"))


def test_all_wrong_flags_are_named(train, capsys):
    with pytest.raises(SystemExit):
        train(1, check_only=True, report_to="abacus", mixed_precision="fp16", cuda_graph=True)
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failed) == 1 and failed[0].startswith("flags ")
    assert failed[0].index("--report_to=abacus: ") < failed[0].index("; mixed precision fp16 needs a GPU")
    assert "; --cuda_graph needs a GPU" in failed[0]
    error = error_line(capsys, train, 1, check_only=True, nframes=0, seed=-1)
    assert error.startswith("error: --nframes=0: at least 1 was needed; --seed=-1: a number from 0 ")


@pytest.mark.parametrize("name", ["run", "diffuEraser/run", "sd-vae-ft-mse/run", "DAVIS/run"])
def test_a_run_beside_weights_and_data(weights, videos, flags, tmp_path, name):
    for source in [*weights.iterdir(), *videos.iterdir()]:
        shutil.copytree(source, tmp_path / source.name)
    folders = {
        "vae_path": tmp_path / "sd-vae-ft-mse",
        "davis_root": tmp_path / "DAVIS",
        "pretrained_stage1_path": tmp_path / "diffuEraser",
    }
    args = parse_args(Stage1, flags(1, output_dir=tmp_path / name, **folders))
    assert checks.check_output_dir(args, Stage1.open_models(args)) == str(tmp_path / name)


def test_a_gpu_without_bf16(monkeypatch):
    monkeypatch.setattr(checks, "gpu_is_used", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert checks.check_flags(parse_args(Stage1, ["--mixed_precision=fp16"]))
    with pytest.raises(InputError, match=r"this GPU has no bf16 .*: use --mixed_precision=fp16, and LOW_MEMORY=1"):
        checks.check_flags(parse_args(Stage1, ["--mixed_precision=bf16"]))


def test_the_smallest_gpu_decides(flags, monkeypatch):
    """Of 80 and 24 GiB: stage 1's weights, gradients and moments take 26."""
    sizes = [SimpleNamespace(total_memory=gib * 2**30) for gib in (80, 24)]
    monkeypatch.setattr(checks, "gpu_is_used", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", sizes.__getitem__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    opened = {"unet_main": SimpleNamespace(parameters=860e6, config={"block_out_channels": [320]}), "brushnet": None}
    args = parse_args(Stage1, flags(1))
    assert checks.check_memory(args, Stage1, opened).endswith("the GPU has 80")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="take 26 GiB, the GPU has 24"):
        checks.check_memory(args, Stage1, opened)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # more processes than GPUs: NCCL has its say later
    assert checks.check_memory(args, Stage1, opened).endswith("the GPU has 80")


def test_a_gpu_too_old_for_triton(monkeypatch):
    """A Pascal card would otherwise fail in the first step, all weights loaded."""
    monkeypatch.setattr(checks, "gpu_is_used", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    with pytest.raises(InputError, match=r"--compile needs a GPU of compute capability 7.0 .*\(COMPILE=0\)"):
        checks.check_flags(parse_args(Stage1, ["--mixed_precision=fp16", "--compile"]))


@pytest.mark.parametrize(
    ("megabytes", "too_large", "small_enough"),
    [(20, {}, {"use_8bit_adam": True}), (11, {"use_8bit_adam": True}, BF16)],
    ids=["moments of 8 bits", "weights of 16"],
)
def test_a_checkpoint_of_fewer_bytes_needs_less_disk(train, capsys, monkeypatch, megabytes, too_large, small_enough):
    """2.2 M trained parameters: 27, 13 or 9 MB."""
    free = shutil.disk_usage("/")._replace(free=megabytes * 10**6)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: free)
    for settings, status in ((too_large, 1), (small_enough, 0)):
        with pytest.raises(SystemExit) as stop:
            train(1, check_only=True, **settings)
        assert stop.value.code == status, capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "processes", "gib"),
    [
        ({}, "1", 46.6),
        ({"gradient_accumulation_steps": 2}, "1", 53.0),
        ({}, "2", 53.0),
        ({"compile": True}, "1", 38.6),
        ({"compile": True, "cuda_graph": True}, "1", 38.6),
        ({"gradient_checkpointing": True}, "1", 26.9),
        ({"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, "1", 29.9),
        ({"use_8bit_adam": True, "gradient_checkpointing": True, "cuda_graph": True}, "1", 20.3),
        ({**BF16, "resolution": 512, "cuda_graph": True}, "1", 13.9),
    ],
)
def test_the_memory_line_counts_gradients_held_in_the_forward_pass(flags, monkeypatch, changes, processes, gib):
    monkeypatch.setenv("WORLD_SIZE", processes)
    settings = {
        "nframes": 10,
        "resolution": 512,
        "mixed_precision": "bf16",
        **changes,
    }
    opened = {"unet_main": SimpleNamespace(parameters=860e6, config={"block_out_channels": [320]}), "brushnet": None}
    line = checks.check_memory(parse_args(Stage1, flags(1, **settings)), Stage1, opened)
    assert line.startswith(f"about {gib} GiB")
