"""BrushNetModel: the branch that tells the UNet what surrounds the hole (https://arxiv.org/abs/2403.06976).

"CA": its blocks keep their cross-attention, as DiffuEraser's do (https://arxiv.org/abs/2501.10018).
"""

from dataclasses import dataclass

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import nn

from common.weights import StrictLoading, accepted_entries
from libs.unet_walk import LayerWalk, embed_timesteps, walk

BRUSHNET_SETTINGS = (  # config entries that a UNet2D does not have
    "conditioning_channels",
    "brushnet_conditioning_channel_order",
    "conditioning_embedding_out_channels",
    "global_pool_conditions",
)


@dataclass
class BrushNetOutput(BaseOutput):
    """Features for the UNet, one (N, c', h', w') tensor per site of the walk."""

    down_block_res_samples: list[torch.Tensor]
    mid_block_res_sample: torch.Tensor
    up_block_res_samples: list[torch.Tensor]


class BrushNetModel(LayerWalk, StrictLoading, diffusers.UNet2DConditionModel):
    """The UNet's topology without its output layers, a 9-channel conv_in, and a zero-initialised 1x1 convolution for
    every site of the walk: an untrained branch changes nothing."""

    @register_to_config
    def __init__(
        self,
        in_channels=4,
        conditioning_channels=5,
        flip_sin_to_cos=True,
        freq_shift=0,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        only_cross_attention=False,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        downsample_padding=1,
        mid_block_scale_factor=1,
        act_fn="silu",
        norm_num_groups=32,
        norm_eps=1e-5,
        cross_attention_dim=1280,
        transformer_layers_per_block=1,
        encoder_hid_dim=None,
        encoder_hid_dim_type=None,
        attention_head_dim=8,
        num_attention_heads=None,
        use_linear_projection=False,
        class_embed_type=None,
        addition_embed_type=None,
        addition_time_embed_dim=None,
        num_class_embeds=None,
        upcast_attention=False,
        resnet_time_scale_shift="default",
        projection_class_embeddings_input_dim=None,
        brushnet_conditioning_channel_order="rgb",
        conditioning_embedding_out_channels=(16, 32, 96, 256),
        global_pool_conditions=False,
        addition_embed_type_num_heads=64,
    ):
        """The arguments are the published config's entries."""
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if brushnet_conditioning_channel_order != "rgb" or global_pool_conditions:
            raise ValueError("BrushNetModel supports the channel order 'rgb' without global pooling only")
        for name in BRUSHNET_SETTINGS:
            del settings[name]
        # The undecorated __init__: the decorated one would add the UNet's entries to BrushNet's config.
        super().__init__.__wrapped__(self, **settings)
        del self.conv_norm_out, self.conv_act, self.conv_out
        conv_in = self.conv_in
        del self.conv_in
        self.conv_in_condition = nn.Conv2d(
            in_channels + conditioning_channels, conv_in.out_channels, conv_in.kernel_size, padding=conv_in.padding
        )

        channels = list(block_out_channels)
        down, up = [channels[0]], []
        for block, c in zip(self.down_blocks, channels, strict=True):
            down += [c] * (len(block.resnets) + len(block.downsamplers or []))
        for block, c in zip(self.up_blocks, reversed(channels), strict=True):
            up += [c] * (len(block.resnets) + len(block.upsamplers or []))
        self.brushnet_down_blocks = nn.ModuleList(zero_convolution(c) for c in down)
        self.brushnet_mid_block = zero_convolution(channels[-1])
        self.brushnet_up_blocks = nn.ModuleList(zero_convolution(c) for c in up)

    @classmethod
    def from_unet(
        cls, unet, brushnet_conditioning_channel_order="rgb", conditioning_channels=5, load_weights_from_unet=True
    ):
        """A BrushNet of `unet`'s topology with a copy of every weight they have in common.

        conv_in_condition gets the UNet's conv_in weights for the noisy latents (channels 0-3) and again for the masked
        image's latents (4-7), zeros for the mask, and a copy of its bias.
        """
        brushnet = cls.from_config(
            {
                **accepted_entries(cls, unet.config),
                "conditioning_channels": conditioning_channels,
                "brushnet_conditioning_channel_order": brushnet_conditioning_channel_order,
            }
        )
        if load_weights_from_unet:
            own, weights = brushnet.state_dict(), unet.state_dict()
            brushnet.load_state_dict({key: weights.get(key, value) for key, value in own.items()})
            latents = unet.conv_in.weight.data
            with torch.no_grad():
                weight = brushnet.conv_in_condition.weight.zero_()
                weight[:, :4] = latents
                weight[:, 4:8] = latents
                brushnet.conv_in_condition.bias.copy_(unet.conv_in.bias)
        return brushnet

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states,
        brushnet_cond,
        conditioning_scale=1.0,
        return_dict=True,
        **unsupported,
    ):
        """Compute a feature for every site of the UNet's walk.

        Args:
            sample: (N, 4, h, w) noisy latents.
            timestep: a number, or (N,) timesteps.
            encoder_hidden_states: (N, n, d) text embeddings.
            brushnet_cond: (N, 5, h, w), the masked image's latents (4), then the mask (1; 1 = keep, 0 = hole).
            conditioning_scale: factor on every feature.

        Returns: BrushNetOutput, or (down list, mid, up list) when return_dict is False; on SD1.5 12, 1 and 15 tensors.
        """
        self.reject_unsupported(unsupported)
        temb = embed_timesteps(self, timestep, sample.shape[0])
        sample = self.conv_in_condition(torch.cat([sample, brushnet_cond], dim=1))
        convolutions = iter([*self.brushnet_down_blocks, self.brushnet_mid_block, *self.brushnet_up_blocks])
        features = []
        walk(self, sample, temb, encoder_hidden_states, collect=lambda site: features.append(next(convolutions)(site)))
        if conditioning_scale != 1.0:
            features = [feature * conditioning_scale for feature in features]
        n = len(self.brushnet_down_blocks)
        down, mid, up = features[:n], features[n], features[n + 1 :]
        return BrushNetOutput(down, mid, up) if return_dict else (down, mid, up)


def zero_convolution(channels):
    convolution = nn.Conv2d(channels, channels, kernel_size=1)
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution
