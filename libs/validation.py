"""Sampling the validation videos: frames with the hole filled, as GIFs."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import imageio
import numpy as np
import torch

from dataset.finetune_dataset import to_tensors
from dataset.frames import read_frame
from libs.diffusion import conditioning_latents
from libs.errors import InputError
from libs.options import pair_by_name

GIF_FPS = 8
MASK_DILATIONS = 4


@dataclass(frozen=True)
class ValidationVideo:
    name: str
    frames: torch.Tensor  # (f, h, w, 3) uint8, RGB
    holes: torch.Tensor  # (f, h, w) uint8, 255 = hole
    prompt_embeds: torch.Tensor  # (1, n, d)


def load_validation_video(images, masks, prompt_embeds, nframes, resolution):
    """The first `nframes` frames and their object masks, any value above 0 = hole, dilated 4 times by a 3x3 cross.

    Frames keep their shape and size, cut to multiples of 8; where the short side exceeds `resolution`, they are shrunk
    to it, so that small runs validate quickly.
    """
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    frames, holes = [], []
    for frame_path, mask_path in pair_by_name(images, masks)[:nframes]:
        frame = read_frame(frame_path)
        mask = read_mask(mask_path)
        if mask.shape != frame.shape[:2]:
            raise InputError(
                f"{mask_path} is {mask.shape[1]}x{mask.shape[0]}, its frame {frame_path} {frame.shape[1]}x"
                f"{frame.shape[0]}: masks of the frames' size were needed"
            )
        mask = cv2.dilate((mask > 0).astype(np.uint8) * 255, cross, iterations=MASK_DILATIONS)
        scale = min(1, resolution / min(mask.shape))
        height, width = (round(side * scale) // 8 * 8 for side in mask.shape)
        frames.append(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA))
        holes.append(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST))
    return ValidationVideo(
        Path(images).name, torch.from_numpy(np.stack(frames)), torch.from_numpy(np.stack(holes)), prompt_embeds
    )


def read_mask(path):
    """(h, w) uint8; palette PNGs keep their indices' order of "0 = background" in the grey values."""
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise InputError(f"{path} is no readable image: masks of the frames' names were needed")
    return mask


@torch.no_grad()
def inpaint(model, codec, sampler, video, num_inference_steps, shared_noise, seed, device):
    """Fill the hole: (f, h, w, 3) uint8. Known pixels are not pasted back; guidance is off.

    Args:
        model: an Inpainter, as prepared by accelerate.
        sampler: a diffusers scheduler such as UniPC.
        shared_noise: start every frame from the same noise (stage 1, whose frames do not see each other).
    """
    generator = torch.Generator(device).manual_seed(seed)
    _, conditioning_pixel_values, masks = to_tensors(video.frames.to(device), video.holes.to(device))
    f, _, height, width = masks.shape
    shape = (codec.vae.config.latent_channels, height // codec.scale, width // codec.scale)
    posterior_noise = torch.randn((f, *shape), generator=generator, device=device)
    conditioning = conditioning_latents(codec, conditioning_pixel_values, masks, posterior_noise)
    if shared_noise:
        latents = torch.randn((1, *shape), generator=generator, device=device).repeat(f, 1, 1, 1)
    else:
        latents = torch.randn((f, *shape), generator=generator, device=device)

    sampler.set_timesteps(num_inference_steps, device=device)
    for timestep in sampler.timesteps:
        model_pred = model(latents, conditioning, timestep[None], video.prompt_embeds)
        latents = sampler.step(model_pred.float(), timestep, latents, return_dict=False)[0]
    pixels = codec.decode(latents)
    return pixels.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def write_gif(path, frames):
    """Write (f, h, w, 3) uint8 frames as a looping GIF of 8 fps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.mimsave(path, list(frames), duration=1000 / GIF_FPS, loop=0)
