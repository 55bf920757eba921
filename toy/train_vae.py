"""A small VAE of its own for toy/learn.sh, trained from scratch on the frames of both datasets.

python -m toy.train_vae --weights toy/learn/weights --davis_root toy/data/DAVIS --ytvos_root toy/data/YTBV
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler

from common.command_line import Parser, require
from common.errors import one_line_errors
from common.hardware import accelerator_or_cpu
from dataset.crop import RESOLUTION_HELP, Crop, resolution
from dataset.folders import list_videos
from dataset.images import read_frames
from libs.base_model import quiet_libraries
from toy.make_weights import made_here

KL_WEIGHT = 1e-6  # just enough to keep the latents' scale in bounds, as Stable Diffusion's VAE does


def load_frames(args):
    """(N, h, w, 3) uint8: the centre of every frame; the last tenth of the videos is not among them but returned
    second, to measure on."""
    videos = list_videos(args)
    rng = np.random.default_rng(args.seed)
    rng.shuffle(videos)
    held_out = max(1, len(videos) // 10)
    parts = []
    for part in (videos[held_out:], videos[:held_out]):
        clips = []
        for video in part:
            frames = read_frames(video.frames)
            clips.append(Crop.of(*frames[0].shape[:2], args.resolution).resize_all(frames))
        parts.append(np.concatenate(clips))
    return parts


def train(args):
    folder = Path(args.weights, "sd-vae-ft-mse")
    require(made_here(args.weights), f"{folder} would be replaced, and is not of toy.make_weights: other --weights "
            "were needed")  # fmt: skip
    device = accelerator_or_cpu()
    torch.manual_seed(args.seed)
    with quiet_libraries():
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder)).to(device)
    frames, held_out = (torch.from_numpy(part).permute(0, 3, 1, 2).to(device) for part in load_frames(args))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=args.steps // 10, num_training_steps=args.steps)
    for step in range(1, args.steps + 1):
        pixels = frames[torch.randint(len(frames), (args.batch_size,), device=device)].float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(decoded.float(), pixels) + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 10) == 0:
            print(f"vae step {step}/{args.steps}  loss {loss.item():.5f}", flush=True)
    with torch.no_grad():
        error, latents = [], []
        for part in held_out.split(16):
            pixels = part.float() / 127.5 - 1
            latents.append(vae.encode(pixels).latent_dist.mean)
            error.append(F.mse_loss(vae.decode(latents[-1]).sample, pixels, reduction="none").mean(dim=(1, 2, 3)))
        psnr = 10 * torch.log10(4 / torch.cat(error)).mean()  # the range is [-1, 1]
        vae.register_to_config(scaling_factor=round(1 / torch.cat(latents).std().item(), 5))
    vae.save_pretrained(folder)
    print(f"{folder}: {psnr:.2f} dB on {len(held_out)} frames of held-out videos, scaling factor "
          f"{vae.config.scaling_factor}")  # fmt: skip


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--weights", default="toy/learn/weights", help="its sd-vae-ft-mse gets trained weights")
    parser.add_argument("--davis_root", default="toy/data/DAVIS")
    parser.add_argument("--ytvos_root", default="toy/data/YTBV")
    parser.add_argument("--resolution", type=resolution, default=32, help=RESOLUTION_HELP)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
