"""What compiled models do differently: equal values and gradients. Code is hardly generated: it would take minutes."""

import shutil
from functools import partial

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn
from torch._dynamo.utils import counters

from libs.training.compiling import (
    FewFrames,
    FrozenConv2d,
    LaidOut,
    NormByChannel,
    SplitGEGLU,
    compile_encoder,
    compile_models,
    compiled_parts,
    replace_layers,
)
from libs.unet_walk import PARTS

pytestmark = pytest.mark.filterwarnings("default")  # torch's tracing warns in passing


@pytest.mark.parametrize("kernel", [1, 3])
def test_frozen_convolutions_keep_no_input(kernel):
    """Input gradients as torch's own, in memory formats as they come."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 4, kernel, padding=kernel // 2).requires_grad_(False)
    sample = torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(2, 4, 5, 7)
    (expected,) = torch.autograd.grad((convolution(sample) * weights).sum(), sample)
    model = nn.Sequential(convolution)
    replace_layers(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = model(sample)
    assert [tensor.shape for tensor in kept] == [convolution.weight.shape]
    (gradient,) = torch.autograd.grad((output * weights).sum(), sample)
    torch.testing.assert_close(gradient, expected)


def test_halves_of_geglu():
    torch.manual_seed(0)
    layer = GEGLU(6, 8)
    sample, weights = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 8)
    results = []
    for _ in range(2):
        output = layer(sample)
        results.append((output, *torch.autograd.grad((output * weights).sum(), [sample, *layer.parameters()])))
        replace_layers(nn.Sequential(layer))
    assert type(layer) is SplitGEGLU
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_scales_have_one_type():
    """diffusers gives its mid blocks' layers the integer."""
    layers = [ResnetBlock2D(in_channels=8, groups=4, output_scale_factor=scale) for scale in (1, 1.0)]
    replace_layers(nn.Sequential(*layers))
    assert [type(layer.output_scale_factor) for layer in layers] == [float, float]


@pytest.mark.parametrize("size", [(7, 5), (35,)])
def test_norms_by_channel(size):
    """Also where a channel's mean is far from its group's, and where one channel is a group."""
    torch.manual_seed(0)
    sample = 3 * torch.randn(2, 12, *size) + 5 * torch.randn(12).view(1, 12, *[1] * len(size))
    for groups in (3, 12):
        norm = NormByChannel(groups, 12)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        expected = norm(sample)  # not compiled: torch's own
        torch.testing.assert_close(norm.by_channel(sample), expected)
        found = norm.half().by_channel(sample.half())
        assert found.dtype == torch.half
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_norms_of_a_compiled_encoder(monkeypatch):
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    sample, by_channel, calls = torch.randn(2, 3, 5, 7), NormByChannel.by_channel, []
    expected = encoder(sample)
    monkeypatch.setattr(NormByChannel, "by_channel", lambda *args: calls.append(1) or by_channel(*args))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compile_encoder(encoder)
    torch.testing.assert_close(encoder.forward(sample), expected)
    assert calls == [1] and encoder.state_dict().keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_which_layers_are_replaced():
    """Trained convolutions need their input; others have a gradient that is no plain convolution."""
    frozen = partial(lambda *args, **settings: nn.Conv2d(*args, **settings).requires_grad_(False), 2, 2, 3)
    model = {"trained": nn.Conv2d(2, 2, 3), "frozen": frozen()}
    model |= {"strided": frozen(stride=2), "grouped": frozen(groups=2), "dilated": frozen(dilation=2)}
    model = nn.ModuleDict(model)
    model["spatial"], model["motion_modules"] = (Attention(query_dim=16, heads=1, dim_head=16) for _ in range(2))
    state_dict = model.state_dict()
    replace_layers(model)
    assert [name for name in model if type(model[name]) is FrozenConv2d] == ["frozen"]
    assert [type(model[name].processor) for name in ("spatial", "motion_modules")] == [AttnProcessor2_0, FewFrames]
    assert model.state_dict().keys() == state_dict.keys()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()  # of which there is none on CPUs
def test_few_frames_see_each_other():
    torch.manual_seed(0)
    attention, sample = Attention(query_dim=32, heads=2, dim_head=16), torch.randn(6, 5, 32)
    expected = attention(sample)
    assert isinstance(attention.processor, AttnProcessor2_0)
    torch.testing.assert_close(FewFrames.in_small_blocks(attention, sample), expected)
    attention.set_processor(FewFrames())
    torch.testing.assert_close(attention(sample), expected)  # not compiled


@pytest.mark.gpu
@pytest.mark.parametrize(("pixels", "channels"), [(4096, 320), (1024, 640), (256, 1280), (8192, 320)])
def test_few_frames_on_a_gpu(monkeypatch, pixels, channels):
    """More blocks than a GPU starts are left to torch's own."""
    torch.manual_seed(0)
    calls, attend = [], FewFrames.in_small_blocks
    monkeypatch.setattr(FewFrames, "in_small_blocks", staticmethod(lambda *args: calls.append(1) or attend(*args)))
    attention = Attention(query_dim=channels, heads=8, dim_head=channels // 8).cuda()
    sample = torch.randn(pixels, 22, channels, device="cuda", requires_grad=True)
    weights = torch.randn_like(sample)
    results = []
    for processor in (AttnProcessor2_0(), FewFrames()):
        attention.set_processor(processor)
        run = torch.compile(attention, fullgraph=True, dynamic=False)
        with torch.autocast("cuda", torch.float16):
            output = run(sample)
        results.append((output, *torch.autograd.grad((output * weights).sum(), [sample, *attention.parameters()])))
        torch._dynamo.reset()
    assert bool(calls) == (pixels < 8192)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@torch.no_grad()
def test_motion_modules_leave_channels_last():
    """diffusers' change it, and every layer after them would change it back."""
    settings = {"num_attention_heads": 2, "attention_head_dim": 4, "norm_num_groups": 4}
    module = AnimateDiffTransformer3D(in_channels=8, **settings)
    sample = torch.randn(6, 8, 3, 5).to(memory_format=torch.channels_last)
    expected = PARTS.motion(module, sample, 3)
    assert not expected.is_contiguous(memory_format=torch.channels_last)
    found = compiled_parts(channels_last=True).motion.__wrapped__(module, sample, 3)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_come_in_channels_last():
    sample = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    found = []
    inner = LaidOut.apply(sample)
    sample.register_hook(found.append)
    (inner * torch.arange(120.0).view(2, 3, 4, 5)).sum().backward()
    (gradient,) = found
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradient, torch.arange(120.0).view(2, 3, 4, 5))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs it on CPUs")
def test_what_is_compiled_is_found_again(monkeypatch, tmp_path):
    """By a later start, custom gradients and all."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compile_models((), by_layer=True)
    for found in ("autograd_cache_miss", "autograd_cache_hit"):
        torch._dynamo.reset()
        counters.clear()
        run = torch.compile(lambda sample: LaidOut.apply(sample) * 2, fullgraph=True, dynamic=False)
        run(torch.randn(2, 3, 4, 5, requires_grad=True)).sum().backward()
        assert counters["aot_autograd"][found] == 1 and not counters["aot_autograd"]["autograd_cache_bypass"]
