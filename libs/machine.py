"""What this machine can do, for the shell scripts' defaults and for the checks: `python -m libs.machine`."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch


def compiling_lacks():
    """What torch.compile needs on a GPU and this machine has not, in words; None where nothing is missing."""
    if not torch.cuda.is_available():
        return "a GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton (pip install triton)"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "a C compiler (apt-get install gcc)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers (apt-get install python3-dev)"
    return None


if __name__ == "__main__":
    print(int(torch.cuda.is_available()), int(compiling_lacks() is None), torch.cuda.device_count())
