"""Filling the holes of whole videos: what validation, eval_DiffuEraser.py and run_diffueraser.py share.

A video longer than the model's clips is denoised in overlapping windows whose predictions are blended in every step
(as MultiDiffusion does in space, https://arxiv.org/abs/2302.08113): each frame has one latent, so that windows cannot
disagree about it. Frames are (f, h, w, 3) uint8 RGB, holes (f, h, w) uint8, non-zero = hole; f and sizes are any.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from diffusers import SchedulerMixin

from dataset.finetune_dataset import to_tensors
from libs.inpainter import Inpainter, conditioning_latents
from libs.vae import FrozenVAE

MASK_DILATIONS = 4  # of object masks in validation and by default in run_diffueraser.py


@dataclass(frozen=True)
class Pipeline:
    """A model with all that it takes to fill holes."""

    model: Inpainter  # or as accelerate prepared it
    vae: FrozenVAE
    sampler: SchedulerMixin  # such as UniPC
    device: torch.device
    nframes: int  # frames per window
    overlap: int  # frames that a window shares with the next
    num_inference_steps: int
    shared_noise: bool  # every frame starts from the same noise (stage 1, whose frames do not see each other)
    dtype: torch.dtype = torch.float32  # a half type: under autocast (a model that accelerate prepared has its own)

    def windows(self, length):
        """[(start, stop)] that cover `length` frames; the last one is moved back so that all are of one length."""
        if length <= self.nframes:
            return [(0, length)]
        stride = self.nframes - self.overlap
        starts = [*range(0, length - self.nframes, stride), length - self.nframes]
        return [(start, start + self.nframes) for start in starts]

    def count_calls(self, length):
        """How often the model is called for `length` frames."""
        return self.num_inference_steps * len(self.windows(length))

    @torch.no_grad()
    def fill(self, frames, holes, prompt_embeds, seed, progress=lambda: None):
        """The whole generated frames, (f, h, w, 3) uint8; guidance is off, known pixels are not pasted back.

        Args:
            prompt_embeds: (1, n, d).
            progress: called after each of the model's calls.
        """
        f, height, width = holes.shape
        frames, holes = pad(frames, self.vae.scale), pad(holes, self.vae.scale)
        shape = (self.vae.channels, *(side // self.vae.scale for side in holes.shape[1:]))
        generator = torch.Generator(self.device).manual_seed(seed)
        posterior_noise = torch.randn((f, *shape), generator=generator, device=self.device)
        conditioning = torch.cat(
            [
                self.encode(frames[start : start + self.nframes], holes[start : start + self.nframes], noise)
                for start, noise in zip(range(0, f, self.nframes), posterior_noise.split(self.nframes), strict=True)
            ]
        )
        if self.shared_noise:
            latents = torch.randn((1, *shape), generator=generator, device=self.device).repeat(f, 1, 1, 1)
        else:
            latents = torch.randn((f, *shape), generator=generator, device=self.device)

        self.sampler.set_timesteps(self.num_inference_steps, device=self.device)
        for timestep in self.sampler.timesteps:
            model_pred = self.predict(latents, conditioning, timestep[None], prompt_embeds, progress)
            latents = self.sampler.step(model_pred, timestep, latents, return_dict=False)[0]
        filled = torch.cat([to_bytes(self.vae.decode(latent)) for latent in latents.split(1)])
        return filled.numpy()[:, :height, :width]

    def encode(self, frames, holes, noise):
        """BrushNet's condition (n, 5, h, w) of a window, whose hole is blacked out first."""
        frames, holes = (torch.from_numpy(array).to(self.device) for array in (frames, holes))
        _, conditioning_pixel_values, masks = to_tensors(frames, holes)
        return conditioning_latents(self.vae, conditioning_pixel_values, masks, noise)

    def predict(self, latents, conditioning, timestep, prompt_embeds, progress):
        """The model's prediction (f, 4, h, w) for all frames: the weighted mean over the windows that hold a frame."""
        windows = self.windows(len(latents))
        total, weights = torch.zeros_like(latents), torch.zeros(len(latents), 1, 1, 1, device=latents.device)
        for start, stop in windows:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                model_pred = self.model(latents[start:stop], conditioning[start:stop], timestep, prompt_embeds)
            weight = ramp(stop - start, self.overlap, latents.device)
            total[start:stop] += weight * model_pred.float()
            weights[start:stop] += weight
            progress()
        return total / weights


def ramp(length, overlap, device):
    """(length, 1, 1, 1): 1 in a window's middle, falling linearly over `overlap` frames to its ends, never to 0."""
    position = torch.arange(1, length + 1, device=device)
    return (torch.minimum(position, position.flip(0)) / (overlap + 1)).clamp(max=1)[:, None, None, None]


def pad(array, multiple):
    """(f, h, w, ...) with both sides continued by their border to the next `multiple`."""
    rest = [(0, -side % multiple) for side in array.shape[1:3]]
    return np.pad(array, [(0, 0), *rest, *[(0, 0)] * (array.ndim - 3)], mode="edge")


def to_bytes(pixel_values):
    """(n, 3, h, w) in [-1, 1] to (n, h, w, 3) uint8 on the CPU."""
    return pixel_values.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu()


def paste(frames, filled, holes, soft_edge=0):
    """`filled` inside the holes, `frames` outside; over `soft_edge` pixels around the hole one fades into the other."""
    if not soft_edge:
        return np.where(holes[..., None] > 0, filled, frames)
    blended = frames.copy()
    for frame, new, hole in zip(blended, filled, holes, strict=True):
        distance = cv2.distanceTransform((hole == 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        if hole.any():
            share = np.clip(1 - distance / (soft_edge + 1), 0, 1)[..., None]
            frame[:] = np.where(share > 0, share * new + (1 - share) * frame, frame).round()
    return blended
