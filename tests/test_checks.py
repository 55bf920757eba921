"""What is checked before a run: --check_only's table, the GPU, memory, disk."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BF16, error_line
from safetensors.torch import save_file

from common.errors import InputError
from libs.checkpoints.checkpoint import TrainerState
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
        train(1, check_only=True, output_dir="/proc/run", scan_data=True)
    table = capsys.readouterr().out
    assert stop.value.code == 1 and "/proc/run cannot be written to" in table
    assert "training data  FAILED  /proc/run/" in table and "memory         ok" in table
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


def test_where_a_run_starts(flags, tmp_path):
    """Never beside an earlier run's checkpoints, before one that it would have to overwrite, or of another stage."""

    def write(step, stage=1):
        folder = tmp_path / f"run/checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        TrainerState(stage, global_step=step).write(folder)
        return folder

    def start(resume_from_checkpoint=None):
        args = parse_args(Stage1, flags(1, resume_from_checkpoint=resume_from_checkpoint))
        return checks.find_start(args, Stage1, None)

    def refused(message, *given):
        with pytest.raises(InputError, match=message):
            start(*given)

    assert start() == ((None, None, []), "a fresh start")
    assert start("latest") == ((None, None, []), "none yet: a fresh start")
    first, second = write(1), write(2)
    refused("holds checkpoints of an earlier run, such as checkpoint-2: resume with")
    for given in ("latest", "checkpoint-2", str(second), "elsewhere/checkpoint-2"):
        (state, folder, notes), _ = start(given)
        assert (state.global_step, folder, notes) == (2, second, [])
    refused("checkpoint-2 is newer than .*checkpoint-1: remove it, or continue checkpoint-1 in another", "checkpoint-1")
    (second / "trainer_state.json").unlink()
    (state, folder, (note,)), _ = start("latest")
    assert (state.global_step, folder) == (1, first) and note.startswith(f"skipped: {second} has no trainer_state.json")
    (first / "trainer_state.json").unlink()
    refused("none of the checkpoints in .* is complete; .*checkpoint-2 has no trainer_state.json", "latest")
    write(3, stage=2)
    refused("checkpoint-3 is of stage 2, this is stage 1: use another --output_dir", "latest")


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("davis_root", "ImageSets/run"),
        ("ytvos_root", "Annotations/run"),
        ("validation_image", "run"),
        ("validation_mask", "run"),
        ("paired_root", "run"),
        ("mask_root", "run"),
        ("masks_of_videos", "run"),
        ("vae_path", "."),
    ],
)
def test_no_run_among_what_it_reads(flags, tmp_path, setting, place):
    source = str(tmp_path / "source")
    args = parse_args(Stage1, flags(1, output_dir=tmp_path / "source" / place))
    setattr(args, setting, [source] if setting.startswith("validation") else source)
    with pytest.raises(InputError, match=f"is also read from: .* than a folder of --{setting}$"):
        checks.check_output_dir(args, {})


@pytest.mark.parametrize("name", ["config.json", "best_checkpoint.json", "logs-finetune-stage1/history.csv"])
def test_no_run_over_files_that_none_has_written(flags, tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    args = parse_args(Stage1, flags(1))
    with pytest.raises(InputError, match=f"{name} is no training run's: choose another --output_dir"):
        checks.check_output_dir(args, {})
    start = {"command": [], "settings": {"logging_dir": args.logging_dir}}
    (tmp_path / "run/config.json").write_text(json.dumps([start]))
    assert checks.check_output_dir(args, {}) == str(tmp_path / "run")


def test_models_of_two_families():
    """One line before weights load, in place of shapes that do not fit in the first step."""
    sizes = {"block_out_channels": [32, 64], "cross_attention_dim": 32, "in_channels": 4}

    def fit(hidden_size=32, latent_channels=4, **changes):
        base = SimpleNamespace(
            text_encoder_folder="text", text_config={"hidden_size": hidden_size},
            vae_folder="vae", vae_config={"latent_channels": latent_channels},
        )  # fmt: skip
        opened = {
            "unet_main": SimpleNamespace(folder="unet", config=sizes),
            "brushnet": SimpleNamespace(folder="brushnet", config={**sizes, **changes}),
            "motion_adapter": None,
        }
        return checks.check_fit(SimpleNamespace(nframes=3), base, opened)

    assert fit(block_out_channels=(32, 64)) == "channels [32, 64]"
    for changes, expected in (
        ({"block_out_channels": [32, 96]}, r"brushnet has block_out_channels \[32, 96\], unet has \[32, 64\]"),
        ({"cross_attention_dim": 48}, "brushnet has cross_attention_dim 48, unet has 32"),
        ({"hidden_size": 48}, "text gives embeddings of 48 values, unet takes 32"),
        ({"latent_channels": 16}, "vae gives latents of 16 values, unet takes 4"),
    ):
        with pytest.raises(InputError, match=f"{expected}: .* of one (model )?family were needed"):
            fit(**changes)


def test_a_rate_that_is_scaled_may_be_small():
    """A polynomial schedule ends at 1e-7: what counts is the rate that it begins at."""
    given = ["--lr_scheduler=polynomial", "--learning_rate=1e-7"]
    with pytest.raises(InputError, match="where --lr_scheduler=polynomial ends"):
        checks.check_flags(parse_args(Stage1, given))
    assert checks.check_flags(parse_args(Stage1, [*given, "--scale_lr"]))


def test_activations_grow_with_clips_frames_pixels_and_width(flags):
    def activations(width=320, **changes):
        unet = SimpleNamespace(parameters=1, config={"block_out_channels": [width]})
        settings = {"nframes": 10, "resolution": 512, **changes}
        args = parse_args(Stage1, flags(1, **settings))
        return checks.estimate_memory(args, Stage1, {"unet_main": unet, "brushnet": None})[1]

    found = [activations(train_batch_size=2), activations(nframes=20), activations(resolution=1024), activations(160)]
    assert found == pytest.approx([factor * activations() for factor in (2, 2, 4, 0.5)])


def test_what_shards_take(monkeypatch, flags, tmp_path):
    """Under FSDP every process holds its share; a checkpoint has the shards besides, and what is frozen. The disk is
    the one that the output folder will be on."""
    args = parse_args(Stage1, flags(1))
    opened = Stage1.open_models(args)
    monkeypatch.setattr(checks, "count_parameters", lambda stage, opened: (10**9, 10**9))
    monkeypatch.setattr(checks, "count_processes", lambda: 4)
    free = shutil.disk_usage("/")._replace(free=10**12)
    monkeypatch.setattr(checks.shutil, "disk_usage", {tmp_path: free}.__getitem__)
    for engine, gib, gb in (("ddp", 18e9 / 2**30, "12.0"), ("fsdp", 18e9 / 4 / 2**30, "18.0")):
        monkeypatch.setattr(checks, "distributed_type", lambda engine=engine: engine)
        assert checks.estimate_memory(args, Stage1, opened)[0] == pytest.approx(gib)
        assert checks.check_disk_space(args, Stage1, opened).endswith(f"a checkpoint takes {gb} GB")


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
