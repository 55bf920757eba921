"""Full-size models with random weights, and how much memory a step's tensors take: for benchmarks and tests."""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from libs.brushnet_CA import BrushNetModel
from libs.inpainter import INPAINTERS, ClipInpainter, FrameInpainter, train_motion_modules_only
from libs.unet_2d_condition import UNet2DConditionModel
from libs.unet_motion_model import MotionAdapter, UNetMotionModel
from toy.make_weights import SIZES

VARIANTS = {  # flags of the trainer
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
    "graphed": {"compile": True, "cuda_graph": True},
    "low_memory": {"gradient_checkpointing": True, "use_8bit_adam": True},
}
MIN_8BIT_SIZE = 4096  # values of a tensor below which bitsandbytes keeps its moments in fp32


def make_model(stage, frozen_dtype, device="cuda"):
    """The stage's Inpainter with random full-size weights."""
    spec = SIZES["full"]["unet"]
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, **spec)
        brushnet = BrushNetModel.from_unet(unet)
        if stage == 1:
            return FrameInpainter(unet, brushnet)
        adapter = MotionAdapter(block_out_channels=spec["block_out_channels"])
        return train_motion_modules_only(
            ClipInpainter(UNetMotionModel.from_unet2d(unet, adapter), brushnet), frozen_dtype
        )


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


def peak_bytes(stage, gradient_checkpointing=False, use_8bit_adam=False):
    """The most bytes that tensors of a step of the stage hold at once."""
    frames, half = INPAINTERS[stage].nframes, torch.bfloat16  # which CPUs know
    with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as memory:
        model = make_model(stage, half, device="cpu")
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
