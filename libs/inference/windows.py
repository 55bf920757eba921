"""Two ways to denoise a clip that is longer than the model's: overlapping windows, made one in every step.

Latents are (f, 4, h, w); a window is (start, stop) in frames. `predict(start, stop)` is the model's prediction for a
window, (stop - start, 4, h, w) fp32.
"""

from dataclasses import dataclass

import torch


def cover(length, nframes, overlap, first=0):
    """Windows from `first` on, each `nframes - overlap` after the one before; the last is flush with the clip's end."""
    starts = [*range(first, length - nframes, nframes - overlap), max(length - nframes, 0)]
    return [(start, min(start + nframes, length)) for start in starts]


@dataclass(frozen=True)
class BlendedPredictions:
    """Predictions are averaged over the windows that hold a frame, then the sampler steps all frames together.

    MultiDiffusion (https://arxiv.org/abs/2302.08113) in time: each frame has one latent, so that windows cannot
    disagree about it. Any sampler, any overlap; the project's default.
    """

    nframes: int  # frames per window
    overlap: int  # frames that a window shares with the next

    def at_step(self, length, number):
        """The windows of the sampler's step `number`: the same in every one."""
        return cover(length, self.nframes, self.overlap)

    def distinct_noises(self, length):
        """How many frames' noises are drawn for so many frames, and then repeated."""
        return length

    def step(self, latents, number, timestep, sampler, predict):
        """The latents after a step."""
        total, weights = torch.zeros_like(latents), torch.zeros(len(latents), 1, 1, 1, device=latents.device)
        for start, stop in self.at_step(len(latents), number):
            weight = ramp(stop - start, self.overlap, latents.device)
            total[start:stop] += weight * predict(start, stop)
            weights[start:stop] += weight
        return sampler.step(total / weights, timestep, latents, return_dict=False)[0]


@dataclass(frozen=True)
class CrossFadedLatents:
    """Every window is stepped by itself, and its latents are faded over those of the windows before, as deployed.

    In odd steps the windows after the first start elsewhere, so that seams move. The sampler must not remember earlier
    steps. DiffuEraser shares a quarter of a window; its noise repeats with a window's length.
    """

    nframes: int
    overlap: int

    def at_step(self, length, number):
        if number % 2 and length > self.nframes:
            return [(0, self.nframes), *cover(length, self.nframes, self.overlap, first=self.nframes // 2)]
        return cover(length, self.nframes, self.overlap)

    def distinct_noises(self, length):
        return min(self.nframes, length)

    def step(self, latents, number, timestep, sampler, predict):
        faded, written = torch.empty_like(latents), 0
        for start, stop in self.at_step(len(latents), number):
            stepped = sampler.step(predict(start, stop), timestep, latents[start:stop], return_dict=False)[0]
            shared = written - start
            mixed = max(shared - 1, 0)  # the last shared frame is the later window's alone
            weights = torch.linspace(0, 1, shared + 2, device=latents.device)[1 : mixed + 1, None, None, None]
            faded[start : start + mixed] = (1 - weights) * faded[start : start + mixed] + weights * stepped[:mixed]
            faded[start + mixed : stop] = stepped[mixed:]
            written = stop
        return faded


BLENDINGS = {"predictions": BlendedPredictions, "latents": CrossFadedLatents}


def ramp(length, overlap, device):
    """(length, 1, 1, 1): 1 in a window's middle, falling linearly over `overlap` frames to its ends, never to 0."""
    position = torch.arange(1, length + 1, device=device)
    return (torch.minimum(position, position.flip(0)) / (overlap + 1)).clamp(max=1)[:, None, None, None]
