"""What a training step computes, for both stages.

Shapes: b clips of f frames; N = b * f; pixels (N, 3, 8h, 8w) in [-1, 1], latents (N, 4, h, w), masks (N, 1, h, w) with
1 = keep, 0 = hole; timesteps (b,), one per clip; text embeddings (b, n, d).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dataset.finetune_dataset import to_tensors


class Inpainter(nn.Module):
    """UNet and BrushNet as the one module that accelerate prepares; a stage's subclass says how they are called.

    Its forward takes noisy_latents (N, 4, h, w), conditioning (N, 5, h, w), timesteps (b,) and encoder_hidden_states
    (b, n, d), and returns the prediction (N, 4, h, w).
    """

    # What FSDP gathers and frees as one: the layers that the walk calls. Blocks are never called themselves.
    _no_split_modules = ("ResnetBlock2D", "Transformer2DModel")

    def __init__(self, unet_main, brushnet):
        super().__init__()
        self.unet_main = unet_main
        self.brushnet = brushnet

    def enable_gradient_checkpointing(self):
        self.unet_main.enable_gradient_checkpointing()
        self.brushnet.enable_gradient_checkpointing()


class Codec:
    """The frozen VAE: pixels in [-1, 1] to latents of about unit variance, and back. No gradients."""

    def __init__(self, vae):
        self.vae = vae.requires_grad_(False)
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent

    @torch.no_grad()
    def encode(self, pixel_values, noise):
        """A posterior sample, mean + std * noise, times the scaling factor: (N, 3, 8h, 8w) to (N, 4, h, w), fp32."""
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
        return (posterior.mean.float() + posterior.std.float() * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents):
        """(N, 4, h, w) to pixels (N, 3, 8h, 8w) in [-1, 1], frame by frame: decoding takes the most memory of all."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return torch.cat([self.vae.decode(latent).sample.float().clamp(-1, 1) for latent in latents.split(1)])


@dataclass
class Draws:
    """Everything random in a step, (N, 4, h, w) each, and timesteps (b,)."""

    latents: torch.Tensor  # for the posterior samples of the frames
    conditioning: torch.Tensor  # for those of the masked frames
    noise: torch.Tensor
    timesteps: torch.Tensor

    @classmethod
    def from_seeds(cls, noise_seeds, shape, num_train_timesteps, device):
        """Every clip's draws follow from its own seed: batches may be split or resumed anywhere.

        Args:
            noise_seeds: b integers.
            shape: (f, 4, h, w).
        """
        clips, timesteps = [], []
        for seed in noise_seeds:
            generator = torch.Generator(device).manual_seed(seed)
            clips.append(torch.randn((3, *shape), generator=generator, device=device))
            timesteps.append(torch.randint(num_train_timesteps, (1,), generator=generator, device=device))
        return cls(*torch.cat(clips, dim=1), torch.cat(timesteps))


def conditioning_latents(codec, conditioning_pixel_values, masks, noise):
    """BrushNet's condition (N, 5, h, w): the masked frames' latents, then the mask at their size (1 = keep)."""
    latents = codec.encode(conditioning_pixel_values, noise)
    return torch.cat([latents, F.interpolate(masks, size=latents.shape[-2:], mode="nearest")], dim=1)


def diffusion_loss(model, noise_scheduler, latents, noise, conditioning, timesteps, encoder_hidden_states):
    """Mean squared error of the prediction against the noise, or the velocity: a scalar (DDPM,
    https://arxiv.org/abs/2006.11239; velocity, https://arxiv.org/abs/2202.00512)."""
    frame_timesteps = timesteps.repeat_interleave(latents.shape[0] // timesteps.shape[0])
    noisy_latents = noise_scheduler.add_noise(latents, noise, frame_timesteps)
    model_pred = model(noisy_latents, conditioning, timesteps, encoder_hidden_states)
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, frame_timesteps)
    else:
        target = noise
    return F.mse_loss(model_pred.float(), target.float())


def batch_loss(model, codec, noise_scheduler, prompt_embeds, batch, device, timesteps=None):
    """The loss of a batch of `TrainingClips`.

    Args:
        prompt_embeds: (2, n, d), one per entry of PROMPTS.
        timesteps: (b,) to use instead of random ones.
    """
    frames, holes = (batch[key].to(device, non_blocking=True) for key in ("frames", "holes"))
    pixel_values, conditioning_pixel_values, masks = (tensor.flatten(0, 1) for tensor in to_tensors(frames, holes))

    _, f, height, width, _ = frames.shape
    shape = (f, codec.vae.config.latent_channels, height // codec.scale, width // codec.scale)
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    draws = Draws.from_seeds(batch["noise_seeds"], shape, num_train_timesteps, device)

    latents = codec.encode(pixel_values, draws.latents)
    conditioning = conditioning_latents(codec, conditioning_pixel_values, masks, draws.conditioning)
    timesteps = draws.timesteps if timesteps is None else timesteps
    encoder_hidden_states = torch.stack([prompt_embeds[prompt] for prompt in batch["prompts"]])
    return diffusion_loss(model, noise_scheduler, latents, draws.noise, conditioning, timesteps, encoder_hidden_states)
