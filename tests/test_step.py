"""The training step: batches, seeds, and targets."""

import pytest
import torch
from conftest import fill_by_formula, parity_case
from diffusers import DDPMScheduler

from libs.brushnet_CA import BrushNetModel
from libs.diffusion import Draws, diffusion_loss
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import MotionAdapter, UNetMotionModel
from train_DiffuEraser_stage1 import FrameInpainter
from train_DiffuEraser_stage2 import ClipInpainter, freeze


def make_model(stage):
    case, _ = parity_case("batch2")
    unet = UNet2DConditionModel(**case["configs"]["unet"])
    brushnet = BrushNetModel(**case["configs"]["brushnet"])
    fill_by_formula(unet, 1)
    fill_by_formula(brushnet, 2)
    if stage == 1:
        return FrameInpainter(unet, brushnet).double()
    adapter = MotionAdapter(**case["configs"]["motion_adapter"])
    fill_by_formula(adapter, 3)
    return freeze(ClipInpainter(UNetMotionModel.from_unet2d(unet, adapter), brushnet), torch.float32).double()


@pytest.mark.parametrize("stage", [1, 2])
def test_batch_two_is_the_mean_of_two_batches_of_one(stage):
    model, scheduler, f = make_model(stage), DDPMScheduler(), 3
    latents, noise, conditioning = (torch.randn(2 * f, c, 8, 8, dtype=torch.float64) for c in (4, 4, 5))
    timesteps, text = torch.tensor([20, 900]), torch.randn(2, 7, 16, dtype=torch.float64)

    def loss(clips):
        frames = slice(clips.start * f, clips.stop * f)
        return diffusion_loss(
            model, scheduler, latents[frames], noise[frames], conditioning[frames], timesteps[clips], text[clips]
        )

    both = loss(slice(0, 2))
    torch.testing.assert_close(both, (loss(slice(0, 1)) + loss(slice(1, 2))) / 2)
    both.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    ((loss(slice(0, 1)) + loss(slice(1, 2))) / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-5, atol=1e-7, msg=name)


def test_draws_follow_from_each_clips_seed():
    shape = (3, 4, 8, 8)
    both = Draws.from_seeds([5, 6], shape, 1000, torch.device("cpu"))
    alone = Draws.from_seeds([6], shape, 1000, torch.device("cpu"))
    assert torch.equal(both.noise[3:], alone.noise) and torch.equal(both.latents[3:], alone.latents)
    assert torch.equal(both.timesteps[1:], alone.timesteps)
    assert not torch.equal(alone.noise, alone.latents) and not torch.equal(alone.latents, alone.conditioning)
    timesteps = [
        Draws.from_seeds([seed], (1, 1, 1, 1), 1000, torch.device("cpu")).timesteps.item() for seed in range(300)
    ]
    assert min(timesteps) < 30 and max(timesteps) > 970


def test_velocity_prediction():
    model, f = make_model(1), 2
    latents, noise, conditioning = (torch.randn(f, c, 8, 8, dtype=torch.float64) for c in (4, 4, 5))
    inputs = (latents, noise, conditioning, torch.tensor([300]), torch.randn(1, 7, 16, dtype=torch.float64))
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    loss = diffusion_loss(model, scheduler, *inputs)
    noisy = scheduler.add_noise(latents, noise, torch.tensor([300, 300]))
    a = scheduler.alphas_cumprod[300]
    velocity = a.sqrt() * noise - (1 - a).sqrt() * latents
    torch.testing.assert_close(loss, (model(noisy, *inputs[2:]) - velocity).square().mean().float())
