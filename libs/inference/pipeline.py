"""Filling the holes of whole videos: what validation, eval_DiffuEraser.py and run_diffueraser.py share.

Pixels are streams (see streams.py): frames (h, w, 3) uint8 RGB, holes (h, w) uint8, non-zero = hole; any number, any
size. They are read in chunks. Latents of the whole clip stay in memory: some 0.5 MB per frame of 854x480.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin, UniPCMultistepScheduler

from dataset.finetune_dataset import to_tensors
from libs.inference.few_step import FewStepSampler
from libs.inference.streams import first, in_chunks
from libs.inference.windows import BlendedPredictions, CrossFadedLatents
from libs.inpainter import Inpainter, conditioning_latents
from libs.vae import FrozenVAE


class ClipLatents(NamedTuple):
    """What a clip is denoised from; f frames."""

    conditioning: torch.Tensor  # (f, 5, h, w), see `conditioning_latents`
    prior: torch.Tensor | None  # (f, 4, h, w), of another method's result; None: there is none
    noise: torch.Tensor  # (f, 4, h, w)


@dataclass(frozen=True)
class Pipeline:
    """A model with all that it takes to fill holes."""

    model: Inpainter  # or as accelerate prepared it
    vae: FrozenVAE
    sampler: SchedulerMixin  # such as UniPC, or FewStepSampler
    device: torch.device
    nframes: int  # frames per window
    overlap: int  # frames that a window shares with the next
    num_inference_steps: int
    shared_noise: bool  # every frame starts from the same noise (stage 1, whose frames do not see each other)
    dtype: torch.dtype = torch.float32  # a half type: under autocast (a model that accelerate prepared has its own)
    blending: type = BlendedPredictions  # one of windows.BLENDINGS
    two_passes: bool = False  # clips beyond two windows: first a few frames of all of it, as deployed
    prior_scheduler: UniPCMultistepScheduler | None = None  # adds noise to a prior

    @property
    def windows(self):
        return self.blending(self.nframes, self.overlap)

    def first_pass_frames(self, length):
        """The numbers of the frames that are filled first, spread evenly; [] where one pass will do."""
        if not self.two_passes or length <= 2 * self.nframes:
            return []
        return [int(i * (length / self.nframes)) for i in range(self.nframes)]

    def count_work(self, length, with_prior=False):
        """How many frames go through a network, for so many frames: what `progress` is told about, in sum."""
        windows = [self.windows.at_step(length, number) for number in range(self.num_inference_steps)]
        called = sum(stop - start for step in windows for start, stop in step)
        return called + (2 + with_prior) * length + (self.num_inference_steps + 2) * len(self.first_pass_frames(length))

    def fill(self, frames, holes, prompt_embeds, seed, prior=None, progress=lambda frames: None):
        """The whole generated frames as one array, (f, h, w, 3) uint8; see `stream`."""
        return np.stack(list(self.stream(frames, holes, prompt_embeds, seed, prior, progress)))

    @torch.no_grad()
    def stream(self, frames, holes, prompt_embeds, seed, prior=None, progress=lambda frames: None):
        """Yield the whole generated frames, (h, w, 3) uint8; guidance is off, known pixels are not pasted back.

        Args:
            frames, holes, prior: streams of one length and size; the prior is what another method made of the frames.
            prompt_embeds: (1, n, d).
            progress: called with the number of frames that have gone through a network.
        """
        height, width = first(holes).shape
        latents = self.denoise_clip(self.encode_clip(frames, holes, prior, seed, progress), prompt_embeds, progress)
        for chunk in latents.split(self.nframes):
            pictures = to_bytes(self.vae.decode(chunk)).numpy()
            progress(len(pictures))
            yield from pictures[:, :height, :width]

    def encode_clip(self, frames, holes, prior, seed, progress):
        """ClipLatents of the streams, with the seed's noise."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (self.vae.channels, *(-(-side // self.vae.scale) for side in first(holes).shape))

        def draw(count):
            return torch.randn((count, *shape), generator=generator, device=self.device)

        def encode(chunks, encode_chunk):
            """(f, c, h, w): each chunk's latents, one noise per frame for the posterior's sample."""
            latents = []
            for chunk, noise in zip(chunks, draw(len(holes)).split(self.nframes), strict=True):
                latents.append(encode_chunk(*chunk, noise))
                progress(len(noise))
            return torch.cat(latents)

        pairs = zip(in_chunks(frames, self.nframes), in_chunks(holes, self.nframes), strict=True)
        conditioning = encode(pairs, self.encode_masked)
        noise = draw(1 if self.shared_noise else self.windows.distinct_noises(len(holes)))
        noise = noise.repeat(-(-len(holes) // len(noise)), 1, 1, 1)[: len(holes)]
        if prior is not None:
            prior = encode(((chunk,) for chunk in in_chunks(prior, self.nframes)), self.encode_whole)
        return ClipLatents(conditioning, prior, noise)

    def encode_masked(self, frames, holes, noise):
        """BrushNet's condition (n, 5, h, w) of arrays of frames, whose hole is blacked out first."""
        frames, holes = (torch.from_numpy(pad(array, self.vae.scale)).to(self.device) for array in (frames, holes))
        _, conditioning_pixel_values, masks = to_tensors(frames, holes)
        return conditioning_latents(self.vae, conditioning_pixel_values, masks, noise)

    def encode_whole(self, frames, noise):
        """Latents (n, 4, h, w) of an array of frames."""
        return self.encode_masked(frames, np.zeros(frames.shape[:3], np.uint8), noise)[:, : self.vae.channels]

    def denoise_clip(self, clip, prompt_embeds, progress=lambda frames: None):
        """The clip's latents (f, 4, h, w) when all is done, in one pass or two.

        Args:
            clip: ClipLatents.
        """
        numbers = self.first_pass_frames(len(clip.conditioning))
        if numbers:
            clip = self.first_pass(clip, numbers, prompt_embeds, progress)
        return self.denoise(clip, prompt_embeds, progress)

    def first_pass(self, clip, numbers, prompt_embeds, progress):
        """ClipLatents in which the frames of these numbers are known: their holes are empty, and what they show is what
        this pass has filled, in 8 bits; its latents stand in for the prior's."""
        prior = None if clip.prior is None else clip.prior[numbers]
        few = ClipLatents(clip.conditioning[numbers], prior, clip.noise[: len(numbers)])
        latents = self.denoise(few, prompt_embeds, progress)
        pictures = to_bytes(self.vae.decode(latents)).numpy()
        progress(len(pictures))
        no_holes = np.zeros(pictures.shape[:3], np.uint8)
        # Any noise will do for the posterior's sample, which is thousandths off its mean.
        known = self.encode_masked(pictures, no_holes, few.noise)
        progress(len(pictures))
        numbers = torch.tensor(numbers, device=known.device)
        prior = None if clip.prior is None else clip.prior.index_copy(0, numbers, latents)
        return ClipLatents(clip.conditioning.index_copy(0, numbers, known), prior, clip.noise)

    def denoise(self, clip, prompt_embeds, progress):
        """Latents (f, 4, h, w) after all of the sampler's steps."""
        latents = self.start(clip)
        self.sampler.set_timesteps(self.num_inference_steps, device=self.device)
        for number, timestep in enumerate(self.sampler.timesteps):

            def predict(start, stop, latents=latents, timestep=timestep):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    window = latents[start:stop], clip.conditioning[start:stop]
                    model_pred = self.model(*window, timestep[None], prompt_embeds)
                progress(stop - start)
                return model_pred.float()

            latents = self.windows.step(latents, number, timestep, self.sampler, predict)
        return latents

    def start(self, clip):
        """The first step's latents (f, 4, h, w): noise, or a prior that is nearly all noise.

        UniPC's add_noise, before timesteps are set, takes timestep 0 for its last one: 0.0683 prior + 0.9977 noise.
        """
        if clip.prior is None:
            return clip.noise
        return self.prior_scheduler.add_noise(clip.prior, clip.noise, torch.zeros(1, dtype=torch.long))


def deployed_pipeline(model, few_step, base, device, nframes, shared_noise):
    """The Pipeline of DiffuEraser's own inference; its model's UNet has to be folded while it is used.

    with few_step.folded(model.unet_main):
        deployed_pipeline(...).fill(frames, holes, base.prompt_embeds[1:], seed, make_prior("telea", frames, holes))

    Args:
        model: Inpainter, in training too.
        few_step: FewStepWeights.
        base: LoadedBase, or what else has its `vae` and `noise_scheduler`.
        shared_noise: the stage's; frames that do not see each other need no overlap.
    """
    return Pipeline(
        model=model,
        vae=base.vae,
        sampler=FewStepSampler(base.noise_scheduler.config.prediction_type),
        device=device,
        nframes=nframes,
        overlap=0 if shared_noise else nframes // 4,
        num_inference_steps=few_step.steps,
        shared_noise=shared_noise,
        blending=CrossFadedLatents,
        two_passes=True,
        prior_scheduler=UniPCMultistepScheduler.from_config(base.noise_scheduler.config),
    )


def pad(array, multiple):
    """(f, h, w, ...) with both sides continued by their border to the next `multiple`."""
    rest = [(0, -side % multiple) for side in array.shape[1:3]]
    return np.pad(array, [(0, 0), *rest, *[(0, 0)] * (array.ndim - 3)], mode="edge")


def to_bytes(pixel_values):
    """(n, 3, h, w) in [-1, 1] to (n, h, w, 3) uint8 on the CPU."""
    return pixel_values.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu()
