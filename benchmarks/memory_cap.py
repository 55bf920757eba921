"""Runs a script under a hard cap of GPU memory, as on a smaller card: loading, steps, validation and saving.

    python -m benchmarks.memory_cap 24 train_DiffuEraser_stage1.py --mixed_precision=fp16 --gradient_checkpointing ...

torch raises an out-of-memory error where its allocator would pass the cap (in GiB).
"""

import runpy
import sys

import torch

if __name__ == "__main__":
    cap, script = float(sys.argv[1]), sys.argv[2]
    torch.cuda.set_per_process_memory_fraction(cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")
