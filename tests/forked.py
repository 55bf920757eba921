"""The train scripts in processes of their own, forked from a server that has imported torch and diffusers once."""

import multiprocessing
import os
import sys
from multiprocessing.reduction import DupFd

import torch
from conftest import REPOSITORY


def start(main, *arguments, environment=None):
    """(process, its lines) of `main(*arguments)`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_DiffuEraser_stage1", "train_DiffuEraser_stage2"])
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # for the server
    reader, writer = os.pipe()
    process = context.Process(target=run, args=(main, arguments, environment or {}, DupFd(writer)))
    process.start()
    os.close(writer)
    return process, open(reader)


def run(main, arguments, environment, output):
    """In the process: its output goes into a pipe."""
    pipe = output.detach()
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    os.close(pipe)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    torch.set_num_threads(1)
    main(*arguments)


def finish(process, output):
    """All that a process prints that nobody disturbs."""
    with output:
        text = output.read()
    process.join()
    assert process.exitcode == 0, text
    return text
