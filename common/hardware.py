"""What this machine can do: for the launcher's defaults, for the checks, and for scores."""

import importlib.util
import os
import shutil
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from accelerate.utils import parse_flag_from_env


def gpu_is_used():
    """Whether there is a GPU, and accelerate's configuration does not say use_cpu."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def accelerator_or_cpu():
    """The torch.device that work outside a training run is done on."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def available_memory(group=None):
    """Bytes of the machine's memory that may still be taken; of a container or a job with a limit, what that leaves.

    Args:
        group: folder of a control group (https://docs.kernel.org/admin-guide/cgroup-v2.html); None: this process's.
    """
    if group is None:
        own = next((line[3:] for line in read_lines("/proc/self/cgroup") if line.startswith("0::")), "")
        group = Path(f"/sys/fs/cgroup{own}")
    left = [psutil.virtual_memory().available]
    for folder in (group, *group.parents):
        limit = next(iter(read_lines(folder / "memory.max")), "max")
        if limit != "max":
            used = int(read_lines(folder / "memory.current")[0])
            stat = dict(line.split() for line in read_lines(folder / "memory.stat"))
            left.append(int(limit) - used + int(stat.get("inactive_file", 0)))  # files' pages are given back
    return max(0, min(left))


def read_lines(path):
    """[] of a file that cannot be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@contextmanager
def full_precision():
    """Without TF32, which convolutions have by default and which costs a GPU's scores their last digits."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, allowed, strict=True):
            backend.allow_tf32 = value


def compiling_lacks():
    """What torch.compile needs on a GPU and this machine has not, in words; None where nothing is missing."""
    if not gpu_is_used():
        return "a GPU"
    if torch.cuda.get_device_capability() < (7, 0):
        return "a GPU of compute capability 7.0 (Volta) or newer, as Triton does"
    if importlib.util.find_spec("triton") is None:
        return "Triton (pip install triton)"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "a C compiler (apt-get install gcc)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers (apt-get install python3-dev)"
    return None
