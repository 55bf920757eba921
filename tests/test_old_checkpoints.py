"""Checkpoints written by the code of commit 3dd0cc5, which users may still have: see data/old_checkpoints/README.md.

Copying is exact everywhere: conversion is compared bit for bit. Training is compared bit for bit where the libraries
and the CPU compute as those did that wrote the files, and within ROUNDING elsewhere.
"""

import hashlib
import importlib
import json
import shutil
from pathlib import Path

import cv2
import diffusers
import numpy as np
import PIL
import pytest
import torch
from conftest import DATA, equal_files, reset_accelerate
from safetensors.torch import load_file

from common.run_files import HISTORY_FILE, read_rows
from libs.checkpoints.convert import convert

OLD = DATA / "old_checkpoints"
EXPECTED = json.loads((OLD / "expected.json").read_text())  # by the old code, never interrupted
ROUNDING = 0.01  # relative; without Adam's moments the weights' way differs by more than half


@pytest.fixture
def old(tmp_path, monkeypatch):
    """Its folder as the working directory: the old runs named everything relative to it."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    reset_accelerate()
    yield
    reset_accelerate()


def resume(stage):
    """({step: loss}, final weights' file) of the old command, gone on with from checkpoint-2."""
    (start,) = json.loads(Path(f"stage{stage}/config.json").read_text())
    flags = start["command"][1:]
    importlib.import_module(f"train_DiffuEraser_stage{stage}").main([*flags, "--resume_from_checkpoint=latest"])
    rows = read_rows(f"stage{stage}/{start['settings']['logging_dir']}/{HISTORY_FILE}")
    return {row["step"]: float(row["loss"]) for row in rows}, f"stage{stage}/checkpoint-4/model.safetensors"


def arithmetic():
    """What the bits of a training step depend on besides our code: libraries, and how this CPU sums."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), block_out_channels=(4,),
            cross_attention_dim=4, attention_head_dim=2, norm_num_groups=2,
        )  # fmt: skip
        unet(torch.randn(2, 4, 4, 4), 500, torch.randn(2, 77, 4)).sample.square().mean().backward()
    gradients = b"".join(parameter.grad.numpy().tobytes() for parameter in unet.parameters())
    return {
        **{library.__name__: library.__version__ for library in (torch, np, cv2, PIL)},
        "gradients of diffusers' UNet": hashlib.sha256(gradients).hexdigest(),
    }


@pytest.mark.parametrize("stage", [1, 2])
def test_it_resumes(old, stage):
    losses, final = resume(stage)
    expected = EXPECTED[f"stage{stage}"]["losses"]
    assert losses == pytest.approx({step: expected[step] for step in ("3", "4")}, rel=ROUNDING)
    start, ours, theirs = (
        torch.cat([tensor.flatten() for _, tensor in sorted(load_file(path).items())])
        for path in (f"stage{stage}/checkpoint-2/model.safetensors", final, f"stage{stage}/final.safetensors")
    )
    assert (ours - theirs).norm() < ROUNDING * (theirs - start).norm()


@pytest.mark.parametrize("stage", [1, 2])
def test_it_resumes_bit_for_bit(old, stage):
    if arithmetic() != EXPECTED["arithmetic"]:
        pytest.skip("other libraries, or a CPU that sums in another order: the files' bits cannot come out here")
    losses, final = resume(stage)
    expected = EXPECTED[f"stage{stage}"]["losses"]
    assert losses == {step: expected[step] for step in ("3", "4")}
    assert equal_files(final, f"stage{stage}/final.safetensors")


@pytest.mark.parametrize("stage", [1, 2])
def test_it_converts_to_the_same_tensors(old, stage):
    stage1 = {"pretrained_stage1": "weights/diffuEraser"} if stage == 2 else {}
    convert(stage, f"stage{stage}", "converted", **stage1)
    for name, checksum in EXPECTED[f"stage{stage}"]["converted"].items():
        assert checksum_of(f"converted/{name}/diffusion_pytorch_model.safetensors") == checksum, name


def checksum_of(file):
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(file).items()):
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
