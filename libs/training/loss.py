"""What a training step computes, for both stages: a batch in, a loss out.

Shapes: b clips of f frames; N = b * f; pixels (N, 3, 8h, 8w) in [-1, 1], latents (N, 4, h, w), masks (N, 1, h, w) with
1 = keep, 0 = hole; timesteps (b,), one per clip; text embeddings (b, n, d).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from dataset.finetune_dataset import to_tensors
from libs.inpainter import conditioning_latents


def inpainting_loss(model, base, batch, weights=None):
    """The loss of a batch: a scalar.

    Args:
        model: an Inpainter, or as accelerate prepared it.
        base: LoadedBase, with VAE, noise scheduler and prompt embeddings.
        batch: of `TrainingClips.collate`.
        weights: LossWeights; None: all errors count alike.
    """
    return denoising_loss(model, base.noise_scheduler, encode_batch(base, batch, weights))


@dataclass(frozen=True)
class EncodedBatch:
    """A batch in latent space, with everything that is random in its step."""

    latents: torch.Tensor  # (N, 4, h, w), whole frames
    noise: torch.Tensor  # (N, 4, h, w)
    conditioning: torch.Tensor  # (N, 5, h, w), masked frames' latents and masks
    timesteps: torch.Tensor  # (b,)
    encoder_hidden_states: torch.Tensor  # (b, n, d)
    weights: torch.Tensor | None = None  # (N, 1, h, w), of the squared errors; None: all count alike

    @property
    def masks(self):
        """(N, 1, h, w), 1 = keep, 0 = hole."""
        return self.conditioning[:, -1:]


def encode_batch(base, batch, weights=None, timesteps=None):
    """Frames to latents, masked frames and masks to BrushNet's condition; noise and timesteps are drawn.

    Args:
        weights: LossWeights or None.
        timesteps: (b,) to use instead of random ones.
    """
    names = ("frames", "holes", "conditioning_frames")
    frames, *others = (batch[name].to(base.device, non_blocking=True) for name in names if name in batch)
    pixel_values, masked_pixel_values, masks = (tensor.flatten(0, 1) for tensor in to_tensors(frames, *others))

    _, f, height, width, _ = frames.shape
    shape = (f, base.vae.channels, height // base.vae.scale, width // base.vae.scale)
    draws = Draws.from_seeds(batch["noise_seeds"], shape, base.noise_scheduler.config.num_train_timesteps, base.device)
    conditioning = conditioning_latents(base.vae, masked_pixel_values, masks, draws.conditioning)
    return EncodedBatch(
        latents=base.vae.encode_frames(pixel_values, draws.latents, batch),
        noise=draws.noise,
        conditioning=conditioning,
        timesteps=draws.timesteps if timesteps is None else timesteps,
        encoder_hidden_states=torch.stack([base.prompt_embeds[prompt] for prompt in batch["prompts"]]),
        weights=weights and weights.map(conditioning[:, -1:], masks, pixel_values, masked_pixel_values),
    )


def denoising_loss(model, noise_scheduler, encoded):
    """Mean squared error of the model's prediction, weighted where the batch has weights."""
    prediction, target = predict(model, noise_scheduler, encoded)
    if encoded.weights is None:
        return F.mse_loss(prediction, target)
    return weighted_mse(prediction, target, encoded.weights, clips=len(encoded.timesteps))


def predict(model, noise_scheduler, encoded):
    """The model's prediction and its target, (N, 4, h, w) each, fp32: the noise (DDPM, https://arxiv.org/abs/2006.11239)
    or the velocity (https://arxiv.org/abs/2202.00512), whichever the scheduler's config names."""
    latents, noise, timesteps = encoded.latents, encoded.noise, encoded.timesteps
    frame_timesteps = timesteps.repeat_interleave(latents.shape[0] // timesteps.shape[0])
    noisy_latents = noise_scheduler.add_noise(latents, noise, frame_timesteps)
    model_pred = model(noisy_latents, encoded.conditioning, timesteps, encoded.encoder_hidden_states)
    target = noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, frame_timesteps)
    return model_pred.float(), target.float()


def weighted_mse(prediction, target, weights, clips):
    """sum(weight * squared error) / sum(weight) of every clip, and the mean over the clips; 0 for one without weight.

    Args:
        prediction, target: (N, 4, h, w); weights (N, 1, h, w), of all four channels.
    """
    errors = (prediction - target).square().mean(dim=1, keepdim=True)
    weighted, total = (values.reshape(clips, -1).sum(dim=1) for values in (weights * errors, weights))
    return (weighted / total.clamp(min=1e-12)).mean()


@dataclass(frozen=True)
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


class ForwardBackward:
    """Called with every batch: writes gradients, returns the loss () on the device.

    Args:
        accelerator, model: as prepared; `accelerator.accumulate(model)` encloses every call.
        base: LoadedBase.
        weights: LossWeights or None.
    """

    keeps_gradients = False  # whether gradients stay at fixed places in memory: a CUDA graph's do, and DDP's buckets

    def __init__(self, accelerator, model, base, weights=None):
        self.accelerator, self.model, self.base, self.weights = accelerator, model, base, weights
        keeps_gradients = self.keeps_gradients or isinstance(model, DistributedDataParallel)
        self.accumulates_in_place = keeps_gradients and accelerator.gradient_accumulation_steps > 1

    def __call__(self, batch):
        loss = inpainting_loss(self.model, self.base, batch, self.weights)
        self.accelerator.backward(loss)
        return loss.detach()

    def clear_gradients(self, optimizer):
        """After the optimizer's step. Zeroed where several passes add to fixed places: a second set takes memory."""
        optimizer.zero_grad(set_to_none=not self.accumulates_in_place)

    def release(self):
        """Give memory back, to validate or save."""
