"""Whole videos: windows, sizes, blending, and pasting."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clips import moving_video
from diffusers import UniPCMultistepScheduler

import libs.vae
from libs.base_model import BaseModel, quiet_libraries
from libs.inference.composition import paste, paste_frame, resize_picture
from libs.inference.few_step import FewStepSampler
from libs.inference.pipeline import Pipeline, deployed_pipeline
from libs.inference.windows import CrossFadedLatents, ramp
from libs.vae import FrozenVAE


class PixelVAE:
    """A VAE whose latents are pixels, averaged over 4x4 blocks: what a model says can be read off the result."""

    scale = 4

    channels = 3

    def encode(self, pixel_values, noise):
        return torch.nn.functional.avg_pool2d(pixel_values, 4)

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents, scale_factor=4.0).clamp(-1, 1)


def make_pipeline(model, nframes=4, overlap=2, steps=3, **changes):
    with quiet_libraries():
        sampler = UniPCMultistepScheduler(prediction_type="sample")
    settings = {"vae": PixelVAE(), "sampler": sampler, "device": torch.device("cpu"), "shared_noise": False}
    settings |= changes
    return Pipeline(model=model, nframes=nframes, overlap=overlap, num_inference_steps=steps, **settings)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 6, 9, 60])
@pytest.mark.parametrize(("nframes", "overlap"), [(4, 0), (4, 2), (4, 3), (22, 7)])
def test_windows_cover_every_frame(length, nframes, overlap):
    windows = make_pipeline(None, nframes, overlap).windows.at_step(length, 0)
    assert {t for start, stop in windows for t in range(start, stop)} == set(range(length))
    assert {stop - start for start, stop in windows} == {min(length, nframes)}
    for (_, stop), (start, _) in pairwise(windows):
        assert stop - start >= overlap
    assert len({start for start, _ in windows}) == len(windows)


def test_ramp_falls_to_the_ends_of_a_window():
    weights = ramp(7, 2, "cpu").flatten().tolist()
    assert weights == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 2 / 3, 1 / 3])
    assert ramp(5, 0, "cpu").flatten().tolist() == [1] * 5


def test_windows_are_blended_in_every_step():
    """Windows that say 0, 1, 2, ...: at each frame the weighted mean of those that hold it, without a jump."""
    calls = []

    def model(latents, conditioning, timestep, prompt_embeds):
        calls.append(len(latents))
        return torch.full_like(latents, 0.2 * ((len(calls) - 1) % 3))

    frames, holes = moving_video(8, 16, 16)
    filled = make_pipeline(model).fill(frames, holes, None, seed=0)
    assert calls == [4] * 9 and filled.shape == frames.shape
    levels = (filled.reshape(8, -1).mean(axis=1) / 127.5 - 1) / 0.2
    assert levels == pytest.approx([0, 0, 1 / 3, 2 / 3, 4 / 3, 5 / 3, 2, 2], abs=0.03)


def test_what_the_model_sees():
    """The hole is blacked out, the mask is 1 = keep, and the frame is continued to a multiple of the VAE's block."""
    seen = []

    def model(latents, conditioning, timestep, prompt_embeds):
        seen.append(conditioning)
        return torch.zeros_like(latents)

    frames, holes = moving_video(3, 30, 41)
    filled = make_pipeline(model).fill(frames, holes, None, seed=0)
    assert filled.shape == frames.shape and filled.dtype == np.uint8
    conditioning = seen[0]
    assert conditioning.shape == (3, 4, 8, 11)  # 32x44 inside
    masks = conditioning[:, 3]
    assert set(masks.unique().tolist()) == {0, 1}
    expected = (np.pad(holes, ((0, 0), (0, 2), (0, 3)), mode="edge")[:, ::4, ::4] == 0).astype(np.float32)
    assert np.array_equal(masks.numpy(), expected)
    changed = np.where(holes[..., None] > 0, 255 - frames, frames).astype(np.uint8)
    make_pipeline(model).fill(changed, holes, None, seed=0)
    assert torch.equal(seen[0], seen[-1])


def test_a_model_that_knows_the_truth_returns_it():
    """An identity model gets back each frame at the VAE's precision, whatever the windows are."""
    frames, holes = moving_video(9, 32, 48)
    truth = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents, start = PixelVAE().encode(truth, None), [0, 2, 4, 5]

    def model(noisy, conditioning, timestep, prompt_embeds):
        window = start[model.calls % 4]
        model.calls += 1
        return latents[window : window + 4]

    model.calls = 0
    filled = make_pipeline(model).fill(frames, holes, None, seed=0)
    expected = (PixelVAE().decode(latents) + 1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(filled.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("shared_noise", [True, False])
def test_the_seed_and_the_noise(shared_noise):
    start = []

    def model(latents, conditioning, timestep, prompt_embeds):
        start.append(latents.clone())
        return torch.zeros_like(latents)

    frames, holes = moving_video(3, 16, 16)
    pipeline = make_pipeline(model, steps=1, shared_noise=shared_noise)
    for seed in (1, 1, 2):
        pipeline.fill(frames, holes, None, seed)
    assert torch.equal(start[0], start[1]) and not torch.equal(start[0], start[2])
    assert torch.equal(start[0][0], start[0][1]) == shared_noise


CROSS_FADED = {"blending": CrossFadedLatents, "nframes": 8, "sampler": FewStepSampler()}


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("changes", [{}, {"two_passes": True}, CROSS_FADED])
def test_progress_counts_the_frames(changes, prior):
    """All that go through a network: 3 steps of 4 windows of 4 frames, beside encoding and decoding."""
    done, steps = [], 3
    frames, holes = moving_video(9, 16, 16)
    pipeline = make_pipeline(lambda latents, *rest: latents, prior_scheduler=UniPCMultistepScheduler(), **changes)
    pipeline.fill(frames, holes, None, 0, frames if prior else None, progress=done.append)
    assert sum(done) == pipeline.count_work(9, prior)
    first_pass = (steps + 2) * 4 if "two_passes" in changes else 0
    called = steps * 2 * 8 if changes is CROSS_FADED else steps * 4 * 4
    assert sum(done) == called + (2 + prior) * 9 + first_pass


@pytest.mark.parametrize("changes", [{}, CROSS_FADED])
def test_predictions_in_half_precision_are_sampled_in_full(changes):
    """As a model under autocast returns them: the sampler's own arithmetic is fp32."""
    frames, holes = moving_video(9, 16, 16)

    def latents(convert):
        pipeline = make_pipeline(lambda latents, *rest: convert(torch.tanh(latents).bfloat16()), **changes)
        return pipeline.denoise_clip(pipeline.encode_clip(frames, holes, None, 0, lambda frames: None), None)

    assert torch.equal(latents(lambda prediction: prediction), latents(torch.Tensor.float))


def test_a_velocity_is_sampled_as_the_noise_that_it_stands_for():
    """Of base models that predict velocities: the weights' own prediction type is that of the sampler."""
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for kind in ("epsilon", "v_prediction"):
        base = SimpleNamespace(vae=PixelVAE(), noise_scheduler=FewStepSampler(kind))
        pipeline = deployed_pipeline(None, SimpleNamespace(steps=2), base, torch.device("cpu"), 4, shared_noise=False)
        pipeline.sampler.set_timesteps(2)
        share = pipeline.sampler.alphas_cumprod[499]
        signal, sigma = share**0.5, (1 - share) ** 0.5
        prediction = noise if kind == "epsilon" else signal * noise - sigma * clean
        noisy = signal * clean + sigma * noise
        results.append(pipeline.sampler.step(prediction, torch.tensor(499), noisy, return_dict=False)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("soft_edge", [0, 5])
def test_paste_leaves_the_rest_untouched(soft_edge):
    frames, holes = moving_video(2, 60, 80)
    new = np.full_like(frames, 255)
    pasted = [paste_frame(*of_frame, soft_edge) for of_frame in zip(frames, new, holes, strict=True)]
    assert soft_edge or np.array_equal(pasted, paste(frames, new, holes))
    for frame, result, hole in zip(frames, pasted, holes, strict=True):
        distance = np.min([np.hypot(*np.subtract(np.indices(hole.shape).T, p).T) for p in np.argwhere(hole)], axis=0)
        assert (result[hole > 0] == 255).all()
        assert np.array_equal(result[distance > soft_edge + 1], frame[distance > soft_edge + 1])
        share = np.clip(1 - distance / (soft_edge + 1), 0, 1)[..., None]
        assert np.abs(result - (255 * share + frame * (1 - share))).max() <= 0.51
    assert np.array_equal(paste_frame(frames[0], new[0], np.zeros_like(holes[0]), soft_edge), frames[0])
    assert np.array_equal(paste(frames, new, np.zeros_like(holes)), frames)


@pytest.mark.parametrize("times", [2, 3, 4, 8])
def test_a_shrunk_mask_stays_where_it_was(times):
    """Each side within half of a small pixel: further off, an object's rim would be shown, and left in the result."""
    for start, stop in ((64 + i, 128 + i) for i in range(times)):
        mask = np.zeros((192, 192), np.uint8)
        mask[start:stop, start:stop] = 255
        small = resize_picture(mask, 192 // times, 192 // times)
        for axis in (0, 1):
            found = np.flatnonzero(small.any(axis=axis))
            assert abs(times * found[0] - start) <= times / 2
            assert abs(times * (found[-1] + 1) - stop) <= times / 2


def test_a_frame_grows_without_blocks():
    ramp = np.repeat(np.arange(0, 250, 10, np.uint8)[:, None, None], 25, axis=1).repeat(3, axis=2)
    assert np.diff(resize_picture(ramp, 100, 100)[:, 0, 0].astype(int)).max() < 5


def test_a_real_vae(weights, monkeypatch):
    """The demo's VAE and its 8-pixel blocks, at a size that is no multiple of them."""

    class Args:
        base_model_name_or_path, vae_path = weights / "stable-diffusion-v1-5", weights / "sd-vae-ft-mse"
        revision = variant = tokenizer_name = None

    frozen = BaseModel(Args)
    vae = frozen.load_vae(torch.device("cpu"), torch.float32, frames=5)
    assert isinstance(vae, FrozenVAE)
    frames, holes = moving_video(2, 36, 52)
    pipeline = make_pipeline(lambda latents, *rest: torch.zeros_like(latents), vae=vae)
    filled = pipeline.fill(frames, holes, None, 0)
    assert filled.shape == frames.shape
    monkeypatch.setattr(libs.vae, "MAX_PIXELS_DECODED", 40 * 56 - 1)  # a frame that is larger is decoded alone
    assert np.abs(pipeline.fill(frames, holes, None, 0).astype(int) - filled).max() <= 1
