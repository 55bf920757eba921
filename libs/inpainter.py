"""UNet and BrushNet as the one module that accelerate prepares; a class per stage says how its UNet is called.

Shapes: b clips of f frames, N = b * f; latents (N, 4, h, w); masks (N, 1, h, w), 1 = keep, 0 = hole; timesteps (b,),
one per clip; text embeddings (b, n, d).
"""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from libs.brushnet_CA import BrushNetModel
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import UNetMotionModel


class Inpainter(nn.Module, ABC):
    """Predicts the noise (or velocity) in noisy latents, given what surrounds the hole."""

    stage: int
    unet_class: type
    trains: tuple[str, ...]  # which of the models that a stage opens
    nframes: int  # frames per clip, in training and in a window of inference
    inference_steps: int  # of the sampler
    shared_noise: bool  # sampling starts all frames from the same noise

    # The layers that the walk calls, and FSDP gathers and frees as one. Blocks are never called themselves.
    _no_split_modules = ("ResnetBlock2D", "Transformer2DModel")

    def __init__(self, unet_main, brushnet):
        super().__init__()
        self.unet_main = unet_main
        self.brushnet = brushnet

    def forward(self, noisy_latents, conditioning, timesteps, encoder_hidden_states):
        """The prediction (N, 4, h, w).

        Args:
            noisy_latents: (N, 4, h, w).
            conditioning: (N, 5, h, w), see `conditioning_latents`.
            timesteps: (b,), one per clip; encoder_hidden_states (b, n, d).
        """
        num_frames = noisy_latents.shape[0] // timesteps.shape[0]
        per_frame = timesteps.repeat_interleave(num_frames), encoder_hidden_states.repeat_interleave(num_frames, dim=0)
        with torch.set_grad_enabled("brushnet" in self.trains and torch.is_grad_enabled()):
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


class FrameInpainter(Inpainter):
    """Stage 1: UNet2D and BrushNet, every frame on its own; both train."""

    stage = 1
    unet_class = UNet2DConditionModel
    trains = ("unet_main", "brushnet")
    nframes = 10
    inference_steps = 50
    shared_noise = True

    def call_unet(self, noisy_latents, per_clip, per_frame, num_frames, features):
        return self.unet_main(noisy_latents, *per_frame, **features, return_dict=False)


class ClipInpainter(Inpainter):
    """Stage 2: UNetMotion over whole clips, BrushNet on every frame on its own; only motion modules train."""

    stage = 2
    unet_class = UNetMotionModel
    trains = ("motion_modules",)
    nframes = 22
    inference_steps = 20
    shared_noise = False

    _no_split_modules = (*Inpainter._no_split_modules, "AnimateDiffTransformer3D")

    def call_unet(self, noisy_latents, per_clip, per_frame, num_frames, features):
        return self.unet_main(noisy_latents, *per_clip, num_frames=num_frames, **features, return_dict=False)


INPAINTERS = {cls.stage: cls for cls in (FrameInpainter, ClipInpainter)}


def open_frame_models(folder, variant=None):
    """{name: OpenedWeights} of a converted folder, or of DiffuEraser's: the 2D part of unet_main/, and brushnet/."""
    return {
        "unet_main": UNet2DConditionModel.open_2d_part(Path(folder, "unet_main"), variant=variant),
        "brushnet": BrushNetModel.open(Path(folder, "brushnet"), variant=variant),
    }


def train_motion_modules_only(model, frozen_dtype):
    """Leave only a ClipInpainter's motion modules trainable; the rest is kept in `frozen_dtype`. Returns the model."""
    model.brushnet.requires_grad_(False)
    model.unet_main.freeze_unet2d_params()
    cast_parameters((parameter for parameter in model.parameters() if not parameter.requires_grad), frozen_dtype)
    return model


def cast_parameters(parameters, dtype):
    """Cast them in place. Buffers, such as position tables, are no parameters and stay as they are."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def conditioning_latents(vae, masked_pixel_values, masks, noise):
    """BrushNet's condition (N, 5, h, w): the masked frames' latents, then the mask at their size (1 = keep).

    Args:
        vae: FrozenVAE.
        masked_pixel_values: (N, 3, 8h, 8w) in [-1, 1], the hole at -1 (black).
        masks: (N, 1, 8h, 8w), 1 = keep, 0 = hole.
        noise: (N, 4, h, w), for the posterior's sample.
    """
    latents = vae.encode(masked_pixel_values, noise)
    return torch.cat([latents, F.interpolate(masks, size=latents.shape[-2:], mode="nearest")], dim=1)
