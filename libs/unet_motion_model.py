"""UNetMotionModel: the UNet with AnimateDiff's motion modules (https://arxiv.org/abs/2307.04725) and BrushNet's
features; MotionAdapter: the motion modules alone."""

import diffusers
import torch
from diffusers.models.unets.unet_motion_model import UNetMotionOutput
from diffusers.utils import apply_lora_scale

from common.errors import InputError
from common.weights import OpenedWeights, StrictLoading, read_config, resolve_folder
from libs.unet_2d_condition import gather_features
from libs.unet_walk import LayerWalk, embed_timesteps, walk


class MotionAdapter(StrictLoading, diffusers.MotionAdapter):
    """The motion modules as a model of their own, keys and config as AnimateDiff's published folders have them."""

    @classmethod
    def open_motion_part(cls, path, subfolder=None, revision=None, variant=None):
        """Like `open`; of a UNetMotionModel folder, such as the published diffuEraser/unet_main, the motion modules."""
        folder = resolve_folder(path, subfolder, revision)
        config = read_config(folder, "MotionAdapter", "UNetMotionModel")
        if config["_class_name"] == "MotionAdapter":
            return OpenedWeights(cls, folder, config, variant)
        return OpenedWeights(cls, folder, adapter_config(config), variant, lambda key: "motion_modules" in key)


class UNetMotionModel(LayerWalk, StrictLoading, diffusers.UNetMotionModel):
    """Construction, config and state-dict keys are diffusers'; only the forward pass is ours."""

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states,
        num_frames=24,
        down_block_add_samples=None,
        mid_block_add_sample=None,
        up_block_add_samples=None,
        return_dict=True,
        **unsupported,
    ):
        """Predict the noise (or velocity) in clips of `num_frames` frames.

        Args:
            sample: ((b f), 4, h, w) noisy latents; h and w need not be multiples of 8.
            timestep: a number, or (b,) timesteps, one per clip.
            encoder_hidden_states: (b, n, d) text embeddings, one per clip.
            num_frames: f, at most the config's motion_max_seq_length.
            down_block_add_samples, mid_block_add_sample, up_block_add_samples: BrushNet's three outputs, or all None.
                The lists are not modified.

        Returns: UNetMotionOutput with `sample` ((b f), 4, h, w), or a tuple of it when return_dict is False.
        """
        self.reject_unsupported(unsupported)
        features = gather_features(down_block_add_samples, mid_block_add_sample, up_block_add_samples)
        # Embedded per clip, then repeated: b embeddings instead of b * f.
        temb = embed_timesteps(self, timestep, sample.shape[0] // num_frames).repeat_interleave(num_frames, dim=0)
        encoder_hidden_states = encoder_hidden_states.repeat_interleave(num_frames, dim=0)
        sample = walk(self, self.conv_in(sample), temb, encoder_hidden_states, features, num_frames=num_frames)
        sample = self.conv_out(self.conv_act(self.conv_norm_out(sample)))
        return UNetMotionOutput(sample) if return_dict else (sample,)

    @classmethod
    def from_unet2d(cls, unet, motion_adapter=None, load_weights=True):
        """A motion UNet of `unet`'s layers and `motion_adapter`'s motion modules.

        The weights are copied; without an adapter the motion modules are freshly initialised.
        """
        if motion_adapter is None or not load_weights:
            return super().from_unet2d(unet, motion_adapter, load_weights)
        with torch.device("meta"):  # a billion random numbers less to draw
            model = super().from_unet2d(unet, motion_adapter, load_weights=False)
        state_dict = {**unet.state_dict(), **motion_adapter.state_dict()}
        like = unet.conv_in.weight  # a model's own `device` walks all its modules: 7 s of a core for 1,252 tensors
        copies = {key: tensor.to(like, copy=True) for key, tensor in state_dict.items()}
        model.load_state_dict(copies, assign=True)
        return model


def refuse_long_clips(weights, nframes):
    """Raise InputError where motion modules, of OpenedWeights, have position tables of fewer frames than a clip."""
    longest = weights.config.get("motion_max_seq_length")
    if longest and nframes > longest:
        raise InputError(f"--nframes={nframes}: {weights.folder} takes {longest} frames at most; lower --nframes")


def adapter_config(motion_config):
    """The config of a UNetMotionModel's motion modules."""
    return {
        "block_out_channels": motion_config["block_out_channels"],
        "motion_layers_per_block": motion_config["layers_per_block"],
        "motion_mid_block_layers_per_block": 1,
        "motion_num_attention_heads": motion_config["motion_num_attention_heads"],
        "motion_norm_num_groups": motion_config["norm_num_groups"],
        "motion_max_seq_length": motion_config["motion_max_seq_length"],
        "use_motion_mid_block": motion_config["use_motion_mid_block"],
    }
