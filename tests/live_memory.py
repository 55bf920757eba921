"""The most memory that a full-size step's tensors take, counted on tensors without data: no GPU, half a minute.

Counted are weights, optimizer state, and what forward and backward keep and make, 512 px, half precision; not the VAE,
nor what kernels take for themselves, nor norms in fp32, as CUDA has them. So a GPU needs more, see docs/results.md;
what moves a peak, and where it lies, shows without one.
"""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from libs.inpainter import INPAINTERS, cast_parameters
from toy.full_size import make_model

MIN_8BIT_SIZE = 4096  # values of a tensor below which bitsandbytes keeps its moments in fp32


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as they live."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key)

    def remove(self, key):
        self.now -= self.sizes.pop(key)


def peak_bytes(stage, gradient_checkpointing=False, use_8bit_adam=False, bf16_weights=False):
    """The most bytes that tensors of a step of the stage hold at once."""
    frames, half = INPAINTERS[stage].nframes, torch.bfloat16  # which CPUs know
    with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as memory:
        model = make_model(stage, half, device="cpu")
        if bf16_weights:
            cast_parameters(model.parameters(), half)
        memory.peak = memory.now  # making it takes more, once
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()
        moments = []
        for size in (parameter.numel() for parameter in model.parameters() if parameter.requires_grad):
            eight_bit = use_8bit_adam and size >= MIN_8BIT_SIZE
            moments.append(torch.empty(2, size, dtype=torch.uint8 if eight_bit else torch.float32))
        inputs = torch.empty(frames, 4, 64, 64), torch.empty(frames, 5, 64, 64), torch.zeros(1), torch.empty(1, 77, 768)
        with torch.autocast("cpu", half):
            loss = model(*inputs).float().square().mean()
        loss.backward()
    return memory.peak
