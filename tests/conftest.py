"""Tiny weights and drawn videos, made once per test process, and the train scripts run in this process."""

import copy
import importlib
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from clips import CopyingPipeline, moving_video, write_frames
from PIL import Image

import run_diffueraser
from toy.make_videos import make_videos
from toy.make_weights import SIZES, make_weights

DATA = Path(__file__).parent / "data"
REPOSITORY = Path(__file__).parents[1]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]  # scores' recorded numbers hold on both
STARTS_PROCESSES = ("test_distributed", "test_fsdp", "test_kill", "test_launch", "test_slurm")
# Flags of LOW_MEMORY=2. At 32 px feature maps of one value come up, in whose gradients oneDNN's bf16 convolutions write
# past their memory (torch 2.13 on a CPU).
BF16 = {"bf16_weights": True, "use_8bit_adam": True, "gradient_checkpointing": True, "mixed_precision": "bf16",
        "resolution": 64}  # fmt: skip
TWO_BLOCKS = copy.deepcopy(SIZES["tiny"])  # of the published layout's four: every tensor takes its time, however small
TWO_BLOCKS["unet"] |= {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

torch.set_num_threads(1)
os.environ["LATENT_CACHE"] = ""  # the shell scripts' default lies in the checkout


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the tests that need a GPU, and no others")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bits that are compared are a CPU's: GPUs do not repeat all of theirs
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: torch finds no GPU here")


def pytest_collection_modifyitems(config, items):
    """The longest tests come first: one at the very end would leave the other worker idle."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if config.getoption("--gpu"):
        items[:] = on_gpu
    for item in on_gpu:
        item.add_marker(pytest.mark.skipif("not config.option.gpu", reason="needs a GPU, and --gpu"))
    items.sort(key=lambda item: item.path.stem not in STARTS_PROCESSES)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Tiny weights with two blocks, in the folders of the published ones."""
    folder = tmp_path_factory.mktemp("weights")
    with mock.patch.dict(SIZES, two_blocks=TWO_BLOCKS):
        make_weights(folder, "two_blocks")
    return folder


@pytest.fixture(scope="session")
def published_layout(tmp_path_factory):
    """Tiny weights with every layer of the published ones."""
    folder = tmp_path_factory.mktemp("published_layout")
    make_weights(folder)
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """DAVIS/ and YTBV/ with drawn videos."""
    folder = tmp_path_factory.mktemp("videos")
    make_videos(folder)
    return folder


@pytest.fixture
def flags(weights, videos, tmp_path):
    """stage, overrides -> the command line of a run of few, small steps."""

    def make(stage, **overrides):
        settings = {
            "base_model_name_or_path": weights / "stable-diffusion-v1-5",
            "vae_path": weights / "sd-vae-ft-mse",
            "davis_root": videos / "DAVIS",
            "ytvos_root": videos / "YTBV",
            "output_dir": tmp_path / "run",
            "resolution": 32,
            "nframes": 3,
            "max_train_steps": 2,
            "dataloader_num_workers": 0,
            "logging_steps": 1,
            "validation_steps": 0,
            "learning_rate": 1e-3,
            "report_to": "none",
        }
        if stage == 1:
            settings["pretrained_stage1_path"] = weights / "diffuEraser"
        else:
            settings["pretrained_stage1"] = weights / "diffuEraser"
            settings["motion_adapter_path"] = weights / "diffuEraser" / "unet_main"
        settings.update(overrides)
        given = {name: value for name, value in settings.items() if value is not None}
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]

    return make


@pytest.fixture
def train(flags):
    """Run a train script's main in this process, as `accelerate launch` would on one CPU."""

    def run(stage, **overrides):
        reset_accelerate()
        importlib.import_module(f"train_DiffuEraser_stage{stage}").main(flags(stage, **overrides))

    yield run
    reset_accelerate()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run_diffueraser.py with a model that copies: (exit status, stdout, stderr)."""
    monkeypatch.setattr(run_diffueraser, "load_pipeline", lambda args, weights: (CopyingPipeline(), None, 1))

    def call(video, mask, output=tmp_path / "out", *flags):
        status = 0
        try:
            run_diffueraser.main([f"--video={video}", f"--mask={mask}", f"--output_dir={output}", *flags])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def clip(tmp_path):
    """frames/ (6 frames of 64x48) and mask.png."""
    frames, holes = moving_video(6, 48, 64)
    write_frames(tmp_path / "clip", frames)
    Image.fromarray(holes[0]).save(tmp_path / "mask.png")
    return SimpleNamespace(frames=frames, folder=tmp_path / "clip", mask=tmp_path / "mask.png")


def reset_accelerate():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def wait_for_line(log, text):
    """Block until a process that is running has written `text` into its log."""
    command = ["tail", "-n", "+1", "-F", str(log)]
    follow = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert any(text in line for line in follow.stdout)
    finally:
        follow.kill()
        follow.communicate()


def error_line(capsys, main, *arguments, **settings):
    """The one line on stderr with which `main` ends, with status 1."""
    with pytest.raises(SystemExit) as stop:
        main(*arguments, **settings)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


def assert_holds(model, tensors):
    """The model has every one of these {key: tensor}, bit for bit."""
    found = model.state_dict()
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor), key


def equal_files(first, second):
    """Whether two safetensors files hold the same bits."""
    from safetensors.torch import load_file

    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
