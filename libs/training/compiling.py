"""torch.compile for the models, and what their layers do differently for it: equal values, less memory traffic."""

import torch
import torch._functorch.config
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from libs.unet_walk import PARTS, Parts

SHORT = 32  # tokens of a sequence that one block of a kernel holds; motion modules have a clip's frames, 22
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")  # of flex_attention's kernels


def compile_models(models, by_layer, channels_last=True):
    """torch.compile, with weights in channels_last, the format that cuDNN gives gradients.

    Args:
        models: UNet and BrushNet.
        by_layer: compile the parts of layers, equal ones once, which takes half as long as each model as one graph. The
            host has more to do in a step, which a CUDA graph hides.
        channels_last: off with 8-bit optimizers, which know torch's default format only.
    """
    set_up_compiling()
    for model in models:
        replace_layers(model)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        if by_layer:
            model.parts = compiled_parts(channels_last)
        else:
            model.compile(fullgraph=True, dynamic=False)


def set_up_compiling():
    torch._dynamo.config.optimize_ddp = False  # it would cut graphs at every 25 MiB of weights
    torch._dynamo.config.recompile_limit = 128  # forms of a layer: its shapes, with gradients and without
    # Else torch's disk cache leaves out what holds an autograd.Function, such as those below: every start traces it.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True


def compile_encoder(encoder):
    """torch.compile for the frozen VAE's encoder, in place."""
    for module in encoder.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = NormByChannel
    encoder.to(memory_format=torch.channels_last)
    encoder.compile(dynamic=False)


def compiled_parts(channels_last):
    parts = Parts(_resnet, PARTS.attention, _motion, PARTS.upsample) if channels_last else PARTS
    return Parts(*map(compile_part, vars(parts).values()))


def compile_part(part):
    return torch.compile(part, fullgraph=True, dynamic=False)


# --- Memory format ----------------------------------------------------------------------------------------------------


class LaidOut(torch.autograd.Function):
    """A sample as it is, whose gradient comes in channels_last: another format would have to be copied."""

    @staticmethod
    def forward(ctx, sample):
        return sample.view_as(sample)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous(memory_format=torch.channels_last)


def laid_out(sample):
    return LaidOut.apply(sample) if sample is not None and sample.requires_grad else sample


def _resnet(resnet, sample, skip, temb):
    return PARTS.resnet(resnet, laid_out(sample), laid_out(skip), temb)


def _motion(motion_module, sample, num_frames):
    sample = PARTS.motion(motion_module, laid_out(sample), num_frames)
    return sample.contiguous(memory_format=torch.channels_last)  # diffusers' leaves that format


# --- Layers -----------------------------------------------------------------------------------------------------------


def replace_layers(model):
    """Make layers those below, in place: they have the same parameters."""
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and is_plain(module) and not module.weight.requires_grad:
            module.__class__ = FrozenConv2d
        elif "motion_modules" in name and hasattr(module, "set_processor"):
            module.set_processor(FewFrames())
        elif type(module) is GEGLU:
            module.__class__ = SplitGEGLU
        elif isinstance(module, ResnetBlock2D):  # 1 in mid blocks and 1.0 in others would be compiled apart
            module.output_scale_factor = float(module.output_scale_factor)


def is_plain(convolution):
    """Whether its input's gradient is a plain convolution too."""
    settings = convolution.stride, convolution.dilation, convolution.groups, convolution.padding_mode
    return settings == ((1, 1), (1, 1), 1, "zeros")


class FrozenConvolution(torch.autograd.Function):
    """Keeps no input for the weight's gradient, which nobody asks for; torch's own does, or computes it again."""

    @staticmethod
    def forward(ctx, sample, weight, bias, padding):
        ctx.save_for_backward(weight)
        ctx.padding = padding
        return F.conv2d(sample, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return F.conv_transpose2d(gradient, weight, padding=ctx.padding), None, None, None


class FrozenConv2d(nn.Conv2d):
    def forward(self, sample):
        return FrozenConvolution.apply(sample.to(self.weight.dtype), self.weight, self.bias, self.padding)


class SplitGEGLU(GEGLU):
    """GEGLU (https://arxiv.org/abs/2002.05202) as two products: in one, its halves' gradients are joined in memory."""

    def forward(self, sample):
        halves = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        values, gate = (F.linear(sample, weight, bias) for weight, bias in halves)
        return values * self.gelu(gate)


class NormByChannel(nn.GroupNorm):
    """GroupNorm by statistics of channels first: in channels_last, the values of a group do not lie together."""

    def forward(self, sample):
        return self.by_channel(sample) if torch.compiler.is_compiling() else super().forward(sample)

    def by_channel(self, sample):
        """(N, c, h, w), or (N, c, pixels) as in diffusers' attention."""
        variance, mean = torch.var_mean(sample.flatten(2).float(), dim=2, correction=0)
        means = mean.unflatten(1, (self.num_groups, -1))
        group_mean = means.mean(2, keepdim=True)
        within = variance.unflatten(1, (self.num_groups, -1)).mean(2, keepdim=True)
        group_variance = within + (means - group_mean).square().mean(2, keepdim=True)
        weight, bias = (values.float().unflatten(0, (self.num_groups, -1)) for values in (self.weight, self.bias))
        scale = weight * torch.rsqrt(group_variance + self.eps)
        shift = bias - group_mean * scale
        scale, shift = (values.flatten(1)[(...,) + (None,) * (sample.ndim - 2)] for values in (scale, shift))
        return (sample * scale + shift).to(sample.dtype)


class FewFrames(AttnProcessor2_0):
    """Self-attention in blocks of 32 tokens: those of torch's kernels are mostly empty with a clip's 22 frames."""

    def __call__(self, attention, hidden_states, **others):
        pixels, frames, channels = hidden_states.shape
        # flex_attention may start as many rows of blocks, of which GPUs take 2^16 - 1, and needs heads of 16 channels.
        fits = pixels * attention.heads < 2**16 and frames <= SHORT and channels // attention.heads >= 16
        if fits and hidden_states.is_cuda and torch.compiler.is_compiling():
            return self.in_small_blocks(attention, hidden_states)
        return super().__call__(attention, hidden_states, **others)

    @staticmethod
    def in_small_blocks(attention, hidden_states):
        """(L, f, c) to (L, f, c): every one of the L pixels' f frames see each other."""
        heads = (
            project(hidden_states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        options = {**dict.fromkeys(BLOCKS, SHORT), "num_stages": 1, "num_warps": 4}
        hidden_states = flex_attention(*heads, kernel_options=options).transpose(1, 2).flatten(2)
        for layer in attention.to_out:
            hidden_states = layer(hidden_states)
        return hidden_states
