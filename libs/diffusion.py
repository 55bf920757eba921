"""What a training step computes, for both stages.

Shapes: b clips of f frames; N = b * f; pixels (N, 3, 8h, 8w) in [-1, 1], latents (N, 4, h, w), masks (N, 1, h, w) with
1 = keep, 0 = hole; timesteps (b,), one per clip; text embeddings (b, n, d).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from dataset.finetune_dataset import to_tensors

MAX_PIXELS_AT_ONCE = 11 * 512**2  # through the VAE's encoder, where they take 4 GiB


class Inpainter(nn.Module, ABC):
    """UNet and BrushNet as the one module that accelerate prepares; a stage's subclass says how the UNet is called."""

    trains_brushnet = True

    # What FSDP gathers and frees as one: the layers that the walk calls. Blocks are never called themselves.
    _no_split_modules = ("ResnetBlock2D", "Transformer2DModel")

    def __init__(self, unet_main, brushnet):
        super().__init__()
        self.unet_main = unet_main
        self.brushnet = brushnet

    def forward(self, noisy_latents, conditioning, timesteps, encoder_hidden_states):
        """The prediction (N, 4, h, w).

        Args:
            noisy_latents: (N, 4, h, w).
            conditioning: (N, 5, h, w).
            timesteps: (b,), one per clip; encoder_hidden_states (b, n, d).
        """
        num_frames = noisy_latents.shape[0] // timesteps.shape[0]
        per_frame = timesteps.repeat_interleave(num_frames), encoder_hidden_states.repeat_interleave(num_frames, dim=0)
        with torch.set_grad_enabled(self.trains_brushnet and torch.is_grad_enabled()):
            down, mid, up = self.brushnet(noisy_latents, *per_frame, brushnet_cond=conditioning, return_dict=False)
        features = {"down_block_add_samples": down, "mid_block_add_sample": mid, "up_block_add_samples": up}
        return self.call_unet(noisy_latents, (timesteps, encoder_hidden_states), per_frame, num_frames, features)[0]

    @abstractmethod
    def call_unet(self, noisy_latents, per_clip, per_frame, num_frames, features):
        """The UNet's prediction, as a tuple of one.

        Args:
            per_clip, per_frame: (timesteps, encoder_hidden_states), b or N of each.
            features: BrushNet's, under the names of the UNet's arguments.
        """

    def enable_gradient_checkpointing(self):
        self.unet_main.enable_gradient_checkpointing()
        self.brushnet.enable_gradient_checkpointing()

    def compile_models(self, channels_last=True):
        """torch.compile, each model as one graph; in cuDNN's own memory format, or gradients would come in another one
        than weights. 8-bit optimizers know one format only."""
        torch._dynamo.config.optimize_ddp = False  # which would cut graphs at every 25 MiB of weights
        if channels_last:
            self.to(memory_format=torch.channels_last)
        for model in (self.unet_main, self.brushnet):
            model.compile(fullgraph=True, dynamic=False)


class Codec:
    """The frozen VAE: pixels in [-1, 1] to latents of about unit variance, and back. No gradients.

    Args:
        frames: of a clip. They are encoded together as far as memory allows, and apart from other clips', so that their
            latents have the same bits however many clips a batch has.
        cache: LatentCache for whole frames, or None.
    """

    def __init__(self, vae, frames, cache=None):
        self.vae, self.frames, self.cache = vae.requires_grad_(False), frames, cache
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent

    def compile_encoder(self):
        self.vae.encoder.to(memory_format=torch.channels_last)
        self.vae.encoder.compile(dynamic=False)

    @torch.no_grad()
    def moments(self, pixel_values):
        """(N, 3, 8h, 8w) to the posterior's c means and c log-variances (N, 2c, h, w), in the VAE's type.

        Every slice has the same size, the last one is filled up: one shape to compile.
        """
        slices, size = [], frames_at_once(self.frames, *pixel_values.shape[2:])
        for pixels in pixel_values.to(self.vae.dtype).split(size):
            lacking = size - len(pixels)
            if lacking:
                pixels = torch.cat([pixels, pixels[-1:].expand(lacking, -1, -1, -1)])
            slices.append(self.vae.encode(pixels).latent_dist.parameters)
        # In the order that moments read from the cache have: another one is another kernel, or a compilation, later on.
        return torch.cat(slices)[: len(pixel_values)].contiguous()

    def sample(self, moments, noise):
        """A posterior sample, mean + std * noise, times the scaling factor: (N, c, h, w), fp32."""
        posterior = DiagonalGaussianDistribution(moments.float())
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    def encode(self, pixel_values, noise):
        """(N, 3, 8h, 8w) to latents (N, c, h, w), fp32."""
        return self.sample(self.moments(pixel_values), noise)

    def encode_frames(self, pixel_values, noise, batch):
        """Like `encode`, for whole frames: those whose moments the loader has found in the cache are not encoded."""
        if "moments" not in batch:
            return self.encode(pixel_values, noise)
        moments = batch["moments"].to(pixel_values.device, non_blocking=True).flatten(0, 1)
        missing = [i for i, key in enumerate(batch["missing"]) if key]
        if missing:
            encoded = self.moments(pixel_values[missing])
            moments[missing] = encoded
            self.cache.add([batch["missing"][i] for i in missing], encoded)
        return self.sample(moments, noise)

    @torch.no_grad()
    def decode(self, latents):
        """(N, c, h, w) to pixels (N, 3, 8h, 8w) in [-1, 1], frame by frame: decoding takes the most memory of all."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return torch.cat([self.vae.decode(latent).sample.float().clamp(-1, 1) for latent in latents.split(1)])


def frames_at_once(frames, height, width):
    """How many of so many frames are encoded together: slices of equal size, as few as memory allows."""
    most = max(1, MAX_PIXELS_AT_ONCE // (height * width))
    return math.ceil(frames / math.ceil(frames / most))


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


def model_inputs(codec, noise_scheduler, prompt_embeds, device, batch, timesteps=None):
    """A batch of `TrainingClips` as what `diffusion_loss` takes: latents, noise, conditioning, timesteps, embeddings.

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

    latents = codec.encode_frames(pixel_values, draws.latents, batch)
    conditioning = conditioning_latents(codec, conditioning_pixel_values, masks, draws.conditioning)
    timesteps = draws.timesteps if timesteps is None else timesteps
    encoder_hidden_states = torch.stack([prompt_embeds[prompt] for prompt in batch["prompts"]])
    return latents, draws.noise, conditioning, timesteps, encoder_hidden_states
