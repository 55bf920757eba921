"""UNet2DConditionModel: diffusers' SD1.5 UNet, with BrushNet's features added at every layer."""

import diffusers
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import apply_lora_scale

from common.weights import OpenedWeights, StrictLoading, accepted_entries, read_config, resolve_folder
from libs.unet_walk import LayerWalk, embed_timesteps, walk


class UNet2DConditionModel(LayerWalk, StrictLoading, diffusers.UNet2DConditionModel):
    """Construction, config and state-dict keys are diffusers'; only the forward pass is ours."""

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states,
        down_block_add_samples=None,
        mid_block_add_sample=None,
        up_block_add_samples=None,
        return_dict=True,
        **unsupported,
    ):
        """Predict the noise (or velocity) in `sample`, every entry on its own.

        Args:
            sample: (N, 4, h, w) noisy latents; h and w need not be multiples of 8.
            timestep: a number, or (N,) timesteps.
            encoder_hidden_states: (N, n, d) text embeddings.
            down_block_add_samples, mid_block_add_sample, up_block_add_samples: BrushNet's three outputs, or all None.
                The lists are not modified.

        Returns: UNet2DConditionOutput with `sample` (N, 4, h, w), or a tuple of it when return_dict is False.
        """
        self.reject_unsupported(unsupported)
        features = gather_features(down_block_add_samples, mid_block_add_sample, up_block_add_samples)
        temb = embed_timesteps(self, timestep, sample.shape[0])
        sample = walk(self, self.conv_in(sample), temb, encoder_hidden_states, features)
        sample = self.conv_out(self.conv_act(self.conv_norm_out(sample)))
        return UNet2DConditionOutput(sample) if return_dict else (sample,)

    @classmethod
    def open_2d_part(cls, path, subfolder=None, revision=None, variant=None):
        """Like `open`; of a UNetMotionModel folder, such as the published diffuEraser/unet_main, the 2D part."""
        folder = resolve_folder(path, subfolder, revision)
        config = read_config(folder, "UNet2DConditionModel", "UNetMotionModel")
        if config["_class_name"] == "UNet2DConditionModel":
            return OpenedWeights(cls, folder, config, variant)
        return OpenedWeights(cls, folder, config_from_motion(config), variant, lambda key: "motion_modules" not in key)


def gather_features(down, mid, up):
    """BrushNet's three outputs as one list in the order of the walk's sites, or None."""
    if down is None and mid is None and up is None:
        return None
    if down is None or mid is None or up is None:
        raise ValueError("BrushNet's down, mid and up features belong together: give all three or none")
    return [*down, mid, *up]


def config_from_motion(motion_config):
    """The config of a UNetMotionModel's 2D part."""
    config = accepted_entries(diffusers.UNet2DConditionModel, motion_config)
    for blocks in ("down_block_types", "up_block_types"):
        config[blocks] = [name.replace("Motion", "2D") for name in motion_config[blocks]]
    # UNetMotionModel names the number of heads correctly, UNet2DConditionModel calls it attention_head_dim.
    config["attention_head_dim"] = motion_config["num_attention_heads"]
    config["num_attention_heads"] = None
    config["mid_block_type"] = "UNetMidBlock2DCrossAttn"
    return config
