"""The optimizer, and its state."""

import importlib.util
from contextlib import contextmanager

import torch

from common.errors import InputError


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
    alike, and a resumed run as one that went on, where GPUs are of one model.
    """
    if not importlib.util.find_spec("bitsandbytes"):
        raise InputError("--bf16_weights needs bitsandbytes: pip install bitsandbytes, or drop the flag (LOW_MEMORY=1)")

    class BF16AdamW(eight_bit_adam()):
        generator = None

        @torch.no_grad()
        def update_step(self, group, p, gindex, pindex):
            exact = torch.nn.Parameter(p.float())
            exact.grad, self.state[exact] = p.grad.float(), self.state[p]
            super().update_step(group, exact, gindex, pindex)
            step = self.state.pop(exact)["step"]
            self.generator = self.generator or torch.Generator(p.device)
            self.generator.manual_seed(step * len(group["params"]) + pindex)  # a CPU's takes 32 bits of it
            p.copy_(round_stochastically(exact, self.generator))

    return BF16AdamW


def round_stochastically(values, generator):
    """fp32 (..., n) to one of the two bf16 neighbours, the nearer one more often: the mean over many is the value."""
    # bf16 is the upper half of an fp32's bits, the second one in memory. A random lower half added to the one there
    # carries over as often as that is large.
    bits = values.view(torch.int32)
    bits = bits + torch.empty_like(bits).random_(1 << 16, generator=generator)
    return bits.view(torch.bfloat16)[..., 1::2]


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
