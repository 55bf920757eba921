"""The optimizer, and its state."""

import importlib.util

import torch

from common.errors import InputError


def make_optimizer(args, parameters, learning_rate, device):
    settings = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        return eight_bit_adam()(parameters, **settings)
    # Fused: one kernel, and fp16's scaler needs no look at the gradients from the host.
    return torch.optim.AdamW(parameters, fused=device.type == "cuda", **settings)


def eight_bit_adam():
    """The class of AdamW with 8-bit state, of whichever library is installed. Raises InputError where neither is."""
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit, optimizer

        # It waits for the GPU after every tensor, of which stage 1 has 1,424; only its paged optimizers need that.
        optimizer.sync_gpu = lambda tensor: None
        return AdamW8bit
    if importlib.util.find_spec("torchao"):
        from torchao.optim import AdamW8bit

        return AdamW8bit
    raise InputError("--use_8bit_adam needs bitsandbytes or torchao: pip install bitsandbytes, or drop the flag")


def match_layout(optimizer):
    """Bring loaded moments into their weights' memory format: with and without compiled models it is another one, and a
    fused optimizer reads both in the order of memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
