"""Run a train script under accelerate's own FSDP2 engine on a mesh of CPU processes.

Without a GPU accelerate ignores an FSDP configuration and runs DDP. Here its state is told otherwise once it is made;
all the rest (preparing, wrapping, clipping, saving, loading) is accelerate's and the trainer's code as on GPUs.
"""

import importlib

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import libs.training.checks
from libs.inpainter import INPAINTERS

make_state = AcceleratorState.__init__


def make_sharded_state(self, *args, fsdp_plugin=None, _from_accelerator=False, **kwargs):
    new = _from_accelerator and not AcceleratorState._shared_state
    make_state(self, *args, fsdp_plugin=fsdp_plugin, _from_accelerator=_from_accelerator, **kwargs)
    if new:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def main(stage, flags):
    AcceleratorState.__init__ = make_sharded_state
    libs.training.checks.check_distributed = lambda args: "fsdp on the CPU"
    INPAINTERS[stage].inference_steps = 2  # gathering a thousand tensors is slow here
    importlib.import_module(f"train_DiffuEraser_stage{stage}").main(flags)
