"""The optimizer, and its state."""

import importlib.util
from contextlib import contextmanager

import torch

from common.errors import InputError

PIECE = 1 << 24  # bf16 weights that are updated in fp32 at once


def make_optimizer(config, parameters, learning_rate, device):
    """AdamW as the settings say. Raises InputError where its library is not installed."""
    settings = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.bf16_weights:
        return bf16_adam()(parameters, **settings)
    if config.use_8bit_adam:
        return eight_bit_adam()(parameters, **settings)
    # Fused: one kernel, and fp16's scaler needs no look at the gradients from the host.
    return torch.optim.AdamW(parameters, fused=device.type == "cuda", **settings)


def eight_bit_adam():
    """The class of AdamW with 8-bit state, of whichever library is installed. Raises InputError where neither is."""
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit, optimizer

        # It waits for the GPU after every tensor, of which stage 1 has 1,424; only its paged optimizers need that.
        optimizer.sync_gpu = lambda tensor: None

        class OrderedAdamW8bit(AdamW8bit):
            def step(self, closure=None):
                with default_stream(self.param_groups[0]["params"][0].device):
                    return super().step(closure)

        return OrderedAdamW8bit
    if importlib.util.find_spec("torchao"):
        from torchao.optim import AdamW8bit

        return AdamW8bit
    raise InputError("--use_8bit_adam needs bitsandbytes or torchao: pip install bitsandbytes, or drop the flag")


@contextmanager
def default_stream(device):
    """bitsandbytes starts its kernels there, whichever stream is the current one: each waits for the other."""
    if device.type != "cuda":
        yield
        return
    default, current = torch.cuda.default_stream(), torch.cuda.current_stream()
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)


def bf16_adam():
    """The class of bitsandbytes' AdamW with 8-bit state for bf16 weights. Raises InputError where it is not installed.

    A weight is updated in fp32 and rounded up or down by chance, so that steps below half of a bf16 weight's last place
    are not lost (arXiv:2010.06192). The chances follow from the step and the weight's place: every process rounds
    alike, and a resumed run as one that went on, where GPUs are of one model. Weights go through fp32 many at a
    time, as stage 1's 1,424, one after the other, would keep the host busy for longer than the GPU.
    """
    if not importlib.util.find_spec("bitsandbytes"):
        raise InputError("--bf16_weights needs bitsandbytes: pip install bitsandbytes, or drop the flag (LOW_MEMORY=1)")

    class BF16AdamW(eight_bit_adam()):
        generator = None

        @torch.no_grad()
        def step(self, closure=None):
            (group,) = self.param_groups
            weights = group["params"]
            for number, piece in enumerate(pieces([weight for weight in weights if weight.grad is not None])):
                values = flatten(piece).float()
                group["params"] = exact = [torch.nn.Parameter(value) for value in views(values, piece)]
                gradients = views(flatten([weight.grad for weight in piece]).float(), piece)
                for weight, one, gradient in zip(piece, exact, gradients, strict=True):
                    one.grad, self.state[one] = gradient, self.state.pop(weight, {})
                super().step()
                for weight, one in zip(piece, exact, strict=True):
                    self.state[weight] = self.state.pop(one)
                self.generator = self.generator or torch.Generator(values.device)
                # A CPU's takes 32 bits of it.
                self.generator.manual_seed(self.state[piece[0]]["step"] * len(weights) + number)
                torch._foreach_copy_(piece, views(round_stochastically(values, self.generator), piece))
            group["params"] = weights

    return BF16AdamW


def pieces(weights):
    """The list in lists, each of PIECE values at most or of one weight."""
    piece, values = [], 0
    for weight in weights:
        if piece and values + weight.numel() > PIECE:
            yield piece
            piece, values = [], 0
        piece.append(weight)
        values += weight.numel()
    if piece:
        yield piece


def flatten(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def views(flat, tensors):
    """Parts of a flat tensor, one after the other, in these tensors' shapes."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def round_stochastically(values, generator):
    """fp32 (..., n) to one of the two bf16 neighbours, the nearer one more often: the mean over many is the value."""
    # bf16 is the upper half of an fp32's bits, the second one in memory. A random lower half added to the one there
    # carries over as often as that is large.
    bits = values.view(torch.int32)
    bits = bits + torch.empty_like(bits).random_(1 << 16, generator=generator)
    return bits.view(torch.bfloat16)[..., 1::2].contiguous()


def match_layout(optimizer):
    """Bring loaded moments into their weights' memory format: with and without compiled models it is another one, and a
    fused optimizer reads both in the order of memory. Its counts of steps belong on the weights' device, too."""
    fused = {parameter for group in optimizer.param_groups if group.get("fused") for parameter in group["params"]}
    for parameter, state in optimizer.state.items():
        if parameter in fused and "step" in state:
            state["step"] = state["step"].to(parameter.device)
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
