"""Full-size models with random weights, for benchmarks and tests."""

import torch

from libs.brushnet_CA import BrushNetModel
from libs.inpainter import ClipInpainter, FrameInpainter, train_motion_modules_only
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import MotionAdapter, UNetMotionModel
from toy.make_weights import SIZES


def make_model(stage, frozen_dtype, device="cuda"):
    """The stage's Inpainter with random full-size weights."""
    spec = SIZES["full"]["unet"]
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, **spec)
        brushnet = BrushNetModel.from_unet(unet)
        if stage == 1:
            return FrameInpainter(unet, brushnet)
        adapter = MotionAdapter(block_out_channels=spec["block_out_channels"])
        return train_motion_modules_only(
            ClipInpainter(UNetMotionModel.from_unet2d(unet, adapter), brushnet), frozen_dtype
        )
