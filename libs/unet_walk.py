"""The one walk through a UNet's layers that all three models share.

BrushNet (https://arxiv.org/abs/2403.06976) hands the UNet a feature for every layer instead of a few residuals per
block, so diffusers' block-wise forward passes cannot be used. The layers themselves are diffusers' own.

Shapes: b clips, f frames, N = b * f; every spatial tensor is (N, c, h, w), every text embedding (N, n, d).
A site is a point where a feature is added or collected, in this order: conv_in's output; each layer of a down block,
then its downsampler; the mid block; each layer of an up block, then its upsampler.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch

from libs.recompute import run_recomputed

MAX_RECOMPUTED = 2**23  # values of a layer's input, across frames: 6 frames of 320 channels at 512x512's latents


def walk(unet, sample, temb, encoder_hidden_states, features=None, collect=None, num_frames=None):
    """Run conv_in's output through `unet`'s blocks, adding a feature or collecting the running sample at every site.

    Args:
        unet: a module with `down_blocks`, `mid_block` and `up_blocks` of diffusers' UNet2D or UNetMotion classes.
        sample: (N, c, h, w), conv_in's output.
        temb: (N, 4c) time embedding.
        encoder_hidden_states: (N, n, d) text embedding.
        features: one (N, c', h', w') tensor per site, added there; None adds nothing.
        collect: called with the running sample of every site (BrushNet).
        num_frames: f, needed by motion modules.

    Returns: (N, c, h, w), what the last up block leaves.
    """
    features = repeat(None) if features is None else iter(features)
    parts = unet.parts
    recompute = unet.gradient_checkpointing and torch.is_grad_enabled()

    def run(layer, modules, *args, pieces=1):
        return run_recomputed(layer, modules, args, pieces) if recompute else layer(*modules, *args)

    def at_site(sample, feature=None):
        sample = sample if feature is None else sample + feature
        if collect is not None:
            collect(sample)
        return sample

    def run_layers(block, sample, skips=None):
        """The running sample after each of the block's layers; up layers take the last of `skips` as they go."""
        attentions = getattr(block, "attentions", repeat(None))
        motion_modules = getattr(block, "motion_modules", repeat(None))
        samples = []
        for resnet, attention, motion_module in zip(block.resnets, attentions, motion_modules, strict=False):
            skip = skips.pop() if skips else None
            args = sample, skip, temb, encoder_hidden_states, next(features)
            # Memory peaks where the backward pass ends, at the first layers, when all gradients are there: only a few
            # frames at a time are recomputed there. With motion modules it peaks in these, which need all frames.
            pieces = 1
            if skip is None and num_frames is None:
                pieces = min(math.ceil(sample.numel() / MAX_RECOMPUTED), len(sample))
            sample = run(partial(_layer, parts), (resnet, attention), *args, pieces=pieces)
            if motion_module is not None:
                sample = run(parts.motion, (motion_module,), sample, num_frames)
            samples.append(at_site(sample))
        return samples

    skips = [sample]  # conv_in's skip connection goes without its feature
    sample = at_site(sample, next(features))
    for block in unet.down_blocks:
        skips += run_layers(block, sample)
        sample = skips[-1]
        for downsampler in block.downsamplers or []:
            sample = at_site(downsampler(sample), next(features))
            skips.append(sample)

    mid = partial(_mid, parts)
    sample = at_site(run(mid, [unet.mid_block], sample, temb, encoder_hidden_states, next(features), num_frames))

    for block in unet.up_blocks:
        sample = run_layers(block, sample, skips)[-1]
        for upsampler in block.upsamplers or []:
            # To the size of the next skip, not simply twice: sizes that are no multiples of 8 come out right.
            sample = at_site(parts.upsample(upsampler, sample, skips[-1].shape[-2:]), next(features))
    return sample


def _layer(parts, resnet, attention, sample, skip, temb, encoder_hidden_states, feature):
    """Resnet, spatial attention, the addition: frames do not see each other."""
    sample = parts.resnet(resnet, sample, skip, temb)
    if attention is not None:
        sample = parts.attention(attention, sample, encoder_hidden_states)
    return sample if feature is None else sample + feature


def _mid(parts, block, sample, temb, encoder_hidden_states, feature, num_frames):
    (attention,), (resnet, second_resnet) = block.attentions, block.resnets
    sample = _layer(parts, resnet, attention, sample, None, temb, encoder_hidden_states, None)
    sample = _layer(parts, second_resnet, None, sample, None, temb, None, feature)
    if hasattr(block, "motion_modules"):
        (motion_module,) = block.motion_modules
        sample = parts.motion(motion_module, sample, num_frames)
        # The published weights were trained with this resnet run twice; without the repetition outputs drift.
        sample = parts.resnet(second_resnet, sample, None, temb)
    return sample


def _resnet(resnet, sample, skip, temb):
    return resnet(sample if skip is None else torch.cat([sample, skip], dim=1), temb)


def _attention(attention, sample, encoder_hidden_states):
    return attention(sample, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]


def _motion(motion_module, sample, num_frames):
    return motion_module(sample, num_frames=num_frames)


def _upsample(upsampler, sample, size):
    return upsampler(sample, output_size=size)


@dataclass(frozen=True)
class Parts:
    """The functions that layers consist of, as they are here or compiled."""

    resnet: Callable
    attention: Callable
    motion: Callable
    upsample: Callable


PARTS = Parts(_resnet, _attention, _motion, _upsample)


def embed_timesteps(unet, timestep, batch_size):
    """Time embedding (batch_size, 4c) of a number, a tensor of one timestep, or one timestep per batch entry."""
    weight = unet.time_embedding.linear_1.weight
    timesteps = torch.as_tensor(timestep, device=weight.device).expand(batch_size)
    # Timesteps always come as fp32 sinusoids; the embedding's weights may be in half precision.
    return unet.time_embedding(unet.time_proj(timesteps).to(weight.dtype))


class LayerWalk:
    """What the three models share: whole-layer gradient checkpointing, and a plain word about unused arguments."""

    gradient_checkpointing = False
    parts = PARTS

    def enable_gradient_checkpointing(self, gradient_checkpointing_func=None):
        """Recompute every layer (resnet, attention, addition) and motion module as one unit in the backward pass.

        diffusers' own switch is set per sub-module and would recompute parts of a layer twice; so its argument, a
        function to checkpoint with, does not apply here.
        """
        if gradient_checkpointing_func is not None:
            raise ValueError("gradient_checkpointing_func is not supported: layers are checkpointed by the walk itself")
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self):
        self.gradient_checkpointing = False

    def enable_freeu(self, *factors, **named_factors):
        """diffusers' switch would be accepted and change nothing: its factors act in blocks, which are not called."""
        raise ValueError("FreeU is not supported: its factors act in blocks, which are not called")

    def reject_unsupported(self, arguments):
        """Pipelines pass many optional arguments as None or False; anything else would be silently without effect.

        Of cross_attention_kwargs "scale", a LoRA's, is taken out before by diffusers' apply_lora_scale.
        """
        arguments |= {f"cross_attention_kwargs {name}": value for name, value in
                      (arguments.pop("cross_attention_kwargs", None) or {}).items()}  # fmt: skip
        given = [name for name, value in arguments.items() if value is not None and value is not False]
        if given:
            raise TypeError(f"{type(self).__name__}.forward does not support {', '.join(given)}")
