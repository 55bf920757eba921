"""The original models' outputs, losses and gradients, computed by the original code, to 1e-4 and usually to the bit."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from libs.brushnet_CA import BrushNetModel
from libs.inpainter import ClipInpainter, FrameInpainter, train_motion_modules_only
from libs.training.loss import EncodedBatch, denoising_loss
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import MotionAdapter, UNetMotionModel
from tests.reference import fill_by_formula, parity_case

TOLERANCE = {"rtol": 0, "atol": 1e-4}
# Weight gradients of strided convolutions depend on the processor's kernels: the reference itself, in fp32, is 3.7e-4
# off the same step in float64.
GRADIENT_TOLERANCE = {"rtol": 5e-4, "atol": 1e-4}


@pytest.fixture(params=["batch2", "odd_size"])
def case(request):
    case, io = parity_case(request.param)
    models = {
        "unet": UNet2DConditionModel(**case["configs"]["unet"]),
        "brushnet": BrushNetModel(**case["configs"]["brushnet"]),
        "motion_adapter": MotionAdapter(**case["configs"]["motion_adapter"]),
    }
    for name, model in models.items():
        assert fill_by_formula(model, case["seeds"][name]) == pytest.approx(case["abs_sum"][name], abs=1e-6)
    return case, io, models


def repeat_frames(tensor, case):
    return tensor.repeat_interleave(case["frames"], dim=0)


def test_brushnet(case):
    case, io, models = case
    down, mid, up = models["brushnet"](
        io["noisy_latents"],
        repeat_frames(io["timesteps"], case),
        encoder_hidden_states=repeat_frames(io["prompt_embeds"], case),
        brushnet_cond=io["conditioning"],
        return_dict=False,
    )
    assert len(down) == 12 and len(up) == 15
    for i, feature in enumerate(down):
        torch.testing.assert_close(feature, io[f"brushnet.down.{i}"], **TOLERANCE)
    torch.testing.assert_close(mid, io["brushnet.mid"], **TOLERANCE)
    for i, feature in enumerate(up):
        torch.testing.assert_close(feature, io[f"brushnet.up.{i}"], **TOLERANCE)


def test_unets_without_features(case):
    case, io, models = case
    pred = models["unet"](
        io["noisy_latents"], repeat_frames(io["timesteps"], case), repeat_frames(io["prompt_embeds"], case)
    ).sample
    torch.testing.assert_close(pred, io["unet2d.plain"], **TOLERANCE)
    motion = UNetMotionModel.from_unet2d(models["unet"], models["motion_adapter"])
    pred = motion(io["noisy_latents"], io["timesteps"], io["prompt_embeds"], num_frames=case["frames"]).sample
    torch.testing.assert_close(pred, io["motion.plain"], **TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "gradient_checkpointing"])
@pytest.mark.parametrize("stage", [1, 2])
def test_training_step(case, stage, recompute):
    """Prediction, loss and every gradient norm of both stages, through the modules that are trained."""
    case, io, models = case
    if stage == 1:
        model = FrameInpainter(models["unet"], models["brushnet"])
    else:
        motion = UNetMotionModel.from_unet2d(models["unet"], models["motion_adapter"])
        model = train_motion_modules_only(ClipInpainter(motion, models["brushnet"]), torch.float32)
    if recompute:
        model.enable_gradient_checkpointing()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == int(io[f"stage{stage}.trainable"])

    pred = model(io["noisy_latents"], io["conditioning"], io["timesteps"], io["prompt_embeds"])
    torch.testing.assert_close(pred, io[f"stage{stage}.pred"], **TOLERANCE)
    scheduler = DDPMScheduler(**case["scheduler"])
    names = ("latents", "noise", "conditioning", "timesteps", "prompt_embeds")
    loss = denoising_loss(model, scheduler, EncodedBatch(*(io[name] for name in names)))
    torch.testing.assert_close(loss, F.mse_loss(pred, io["noise"]))
    assert loss.item() == pytest.approx(case[f"stage{stage}_loss"], abs=1e-4)

    loss.backward()
    for name, part in (("unet", model.unet_main), ("brushnet", model.brushnet)):
        for key, parameter in part.named_parameters():
            expected = io.get(f"stage{stage}.gradnorm.{name}.{key}")
            if expected is None or expected.isnan():
                assert parameter.grad is None, key
            else:
                torch.testing.assert_close(parameter.grad.norm(), expected, **GRADIENT_TOLERANCE, msg=key)
