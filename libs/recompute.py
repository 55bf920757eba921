"""Gradient checkpointing: a layer keeps its inputs alone and runs again in the backward pass (arXiv:1604.06174)."""

from contextvars import copy_context
from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint


def run_recomputed(layer, modules, inputs, pieces=1):
    """layer(*modules, *inputs), of which nothing but `inputs` is kept for the backward pass.

    Args:
        layer: a function of modules and inputs to one tensor (N, ...), in which nothing is random.
        modules: nn.Modules, or None.
        inputs: tensors (N, ...), and anything else, which is passed on as it is.
        pieces: the N entries, which must not see each other, go through the layer in so many groups.
    """
    parameters = [parameter for module in modules if module is not None for parameter in module.parameters()]
    layer = partial(layer, *modules)
    # torch's own function calls two hooks for every tensor that is not kept, a sixth of a step. But FSDP's layers run
    # with other tensors than their parameters.
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        run = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
        return join([run(*piece) for piece in split(inputs, pieces)])
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return Recomputed.apply(layer, trained, pieces, *inputs, *trained)


def split(inputs, pieces):
    """The inputs of every piece, one after the other."""
    columns = (value.tensor_split(pieces) if torch.is_tensor(value) else [value] * pieces for value in inputs)
    return zip(*columns, strict=True)


def join(tensors):
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


class Recomputed(torch.autograd.Function):
    """The parameters are inputs too, so that their gradients go the usual way, past the hooks of DDP."""

    @staticmethod
    def forward(ctx, layer, parameters, pieces, *inputs):
        inputs = inputs[: len(inputs) - len(parameters)]
        ctx.layer, ctx.parameters, ctx.pieces = layer, parameters, pieces
        ctx.constants = [None if torch.is_tensor(value) else value for value in inputs]
        ctx.save_for_backward(*(value if torch.is_tensor(value) else None for value in inputs))
        device = inputs[0].device.type
        # Without its cache, which would hold every layer's weights in half precision until the forward pass ends.
        precision = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        ctx.autocast = partial(torch.autocast, device, cache_enabled=False, **precision)
        # A GPU's backward pass has a thread of its own, in which torch.compile's settings would be the defaults.
        ctx.settings = copy_context()
        with ctx.autocast():
            return join([layer(*piece) for piece in split(inputs, pieces)])

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad):
        saved = zip(ctx.constants, ctx.saved_tensors, strict=True)
        inputs = [constant if tensor is None else tensor for constant, tensor in saved]
        wanted = [index for index in range(len(inputs)) if ctx.needs_input_grad[3 + index]]
        by_piece = []
        for piece, grad in zip(split(inputs, ctx.pieces), output_grad.tensor_split(ctx.pieces), strict=True):
            piece = [value.detach().requires_grad_() if index in wanted else value for index, value in enumerate(piece)]
            with torch.enable_grad(), ctx.autocast():
                output = ctx.settings.run(ctx.layer, *piece)
            variables = [*(piece[index] for index in wanted), *ctx.parameters]
            by_piece.append(torch.autograd.grad(output, variables, grad))
        grads = zip(*by_piece, strict=True)
        input_grads = [join(next(grads)) if index in wanted else None for index in range(len(inputs))]
        return None, None, None, *input_grads, *(sum(pieces[1:], pieces[0]) for pieces in grads)
