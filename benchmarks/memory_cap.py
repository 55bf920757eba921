"""Runs a script under a hard cap of GPU memory, as on a smaller card: loading, steps, validation and saving.

    python -m benchmarks.memory_cap 24 train_DiffuEraser_stage1.py --mixed_precision=fp16 --gradient_checkpointing ...

torch raises an out-of-memory error where its allocator would pass the cap (in GiB).
"""

import argparse
import runpy
import sys

import torch

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gib", type=float)
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    torch.cuda.set_per_process_memory_fraction(args.gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    sys.argv = [args.script, *args.arguments]
    runpy.run_path(args.script, run_name="__main__")
