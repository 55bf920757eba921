"""FrozenVAE: pixels to latents and back (https://arxiv.org/abs/2112.10752)."""

import math

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

MAX_PIXELS_AT_ONCE = 11 * 512**2  # through the VAE's encoder, where they take 4 GiB
MAX_PIXELS_DECODED = 4 * 512**2  # through its decoder, which takes more


class FrozenVAE:
    """Pixels in [-1, 1] to latents of about unit variance, and back. No gradients.

    A posterior is kept as the encoder gives it, (N, 2c, h, w): c means, then c log-variances.

    Args:
        frames: of a clip. How many are encoded at once follows from it and from memory, so that latents have the same
            bits however many clips a batch has.
        cache: LatentCache for whole frames, or None.
    """

    def __init__(self, vae, frames, cache=None):
        self.vae, self.frames, self.cache = vae.requires_grad_(False), frames, cache
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent
        self.channels = vae.config.latent_channels

    @torch.no_grad()
    def posterior(self, pixel_values):
        """(N, 3, 8h, 8w) to the posterior (N, 2c, h, w), in the VAE's type.

        Every slice has the same size, the last one is filled up: one shape to compile.
        """
        slices, size = [], frames_at_once(self.frames, *pixel_values.shape[2:])
        for pixels in pixel_values.to(self.vae.dtype).split(size):
            lacking = size - len(pixels)
            if lacking:
                pixels = torch.cat([pixels, pixels[-1:].expand(lacking, -1, -1, -1)])
            slices.append(self.vae.encode(pixels).latent_dist.parameters)
        # Contiguous, like cached entries: a second memory layout would trigger a recompile.
        return torch.cat(slices)[: len(pixel_values)].contiguous()

    def sample(self, posterior, noise):
        """mean + std * noise, times the scaling factor: (N, c, h, w), fp32."""
        posterior = DiagonalGaussianDistribution(posterior.float())
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    def encode(self, pixel_values, noise):
        """(N, 3, 8h, 8w) to latents (N, c, h, w), fp32."""
        return self.sample(self.posterior(pixel_values), noise)

    def encode_frames(self, pixel_values, noise, batch):
        """Like `encode`, for a batch's whole frames: those that the loader has found in the cache are not encoded."""
        if "posteriors" not in batch:
            return self.encode(pixel_values, noise)
        posteriors = batch["posteriors"].to(pixel_values.device, non_blocking=True).flatten(0, 1)
        missing = [i for i, key in enumerate(batch["missing"]) if key]
        if missing:
            encoded = self.posterior(pixel_values[missing])
            posteriors[missing] = encoded
            self.cache.add([batch["missing"][i] for i in missing], encoded)
        return self.sample(posteriors, noise)

    @torch.no_grad()
    def decode(self, latents):
        """(N, c, h, w) to pixels (N, 3, 8h, 8w) in [-1, 1], a few frames at once: decoding takes the most memory."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pixels = self.scale**2 * latents.shape[2] * latents.shape[3]
        slices = latents.split(max(1, MAX_PIXELS_DECODED // pixels))
        return torch.cat([self.vae.decode(few).sample.float().clamp(-1, 1) for few in slices])


def frames_at_once(frames, height, width):
    """How many of so many frames are encoded together: slices of equal size, as few as memory allows."""
    most = max(1, MAX_PIXELS_AT_ONCE // (height * width))
    return math.ceil(frames / math.ceil(frames / most))
