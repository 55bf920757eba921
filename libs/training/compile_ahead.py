"""Layers compiled by several processes at once, into torch's cache on the disk, from which this one takes them.

Most of torch.compile's work is Python's: in one process, layer after layer, it takes two to four minutes. Which layers
there are, and what they are called with, a step on FakeTensors tells, which have everything but values
(https://docs.pytorch.org/docs/stable/user_guide/torch_compiler/torch.compiler_fake_tensor.html).
"""

import copy
import hashlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config
from torch import nn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import FakeTensorMode

from common.distributed import count_processes_here
from common.errors import first_line
from common.hardware import available_memory
from libs import unet_walk
from libs.training import compiling
from libs.training.log import log
from libs.training.loss import inpainting_loss
from libs.training.stopping import STOP_SIGNALS
from libs.unet_walk import Parts

MOST_PROCESSES = 8
HOST_BYTES = 6 * 2**30  # of the machine's memory, for a process and its compilers, and its share of the models
GPU_BYTES = 5 * 2**30  # of the GPU's, for a process and its largest layer, and its share of the models


class CompileAhead:
    """The processes, which start while models are loaded; none where all was compiled before, or without room for two.

    Args:
        told: whatever tells what a step compiles, in a form that `repr` shows. Where it does not tell all, the first
            step compiles what is missing.
    """

    def __init__(self, device, told):
        self.device, self.begin = device, time.perf_counter()
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
        sources = [Path(module.__file__).read_text() for module in (compiling, unet_walk, sys.modules[__name__])]
        key = hashlib.sha256(repr((told, torch.__version__, gpu, str(device), sources)).encode()).hexdigest()
        self.done = Path(cache_dir(), "diffueraser", key[:32])
        cores, self.processes = room_for_processes(device)
        config = torch._inductor.config
        kept = config.fx_graph_cache and not config.force_disable_caches  # else the first step would find nothing
        if self.processes < 2 or not kept or self.done.exists():
            self.processes = 0
            return
        log.info("compiling in %d processes, once for this machine (COMPILE=0 turns it off)", self.processes)
        settings = torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision, cores // self.processes
        context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
        self.pool = ProcessPoolExecutor(self.processes, context, start_process, (device, *settings))
        with suppress(OSError):  # the system lets no more be started; where it lets none, `run` says so
            for _ in range(self.processes):
                self.pool.submit(int)
        self.started = set(multiprocessing.active_children()) - others

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Where a run fails before `run`, its end would wait for them to start."""
        if self.processes:
            self.kill()

    def kill(self):
        """End the processes at once. They ignore the signal by which a pool ends them, and would wait for ever for a
        lock that one of them held when it was killed."""
        for process in self.started:
            process.kill()
        self.pool.shutdown()

    def run(self, model, base, batch):
        """Compile what a training step runs. What fails is left to the first step, and the log says so. Returns whether
        nothing has.

        Args:
            model: an Inpainter as accelerate prepared it, without DDP around it; its layers are compiled one by one
                (`compile_models`) and not recomputed.
            base: LoadedBase, the encoder of its VAE compiled.
            batch: of `TrainingClips.collate`, of any clips.
        """
        # A noise scheduler keeps its tables on the device of its latest call: here they are FakeTensors.
        base = replace(base, noise_scheduler=copy.copy(base.noise_scheduler))
        return self.compile_step(model, base.vae.vae.encoder, partial(inpainting_loss, model, base, batch))

    def compile_step(self, model, encoder, step):
        """`run`, of any step: a function that nothing outlives of what it makes."""
        try:
            calls = calls_of_a_step(model, encoder, step)
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                compiled, failed = self.compile_all(calls)
        except (RuntimeError, OSError) as error:  # processes that did not start, or what FakeTensors cannot do
            compiled, failed = 0, [first_line(error)]
        if failed:
            self.kill()
        self.pool.shutdown()
        torch.cuda.empty_cache()
        log.info("compiled %d pieces after %.0f s", compiled, time.perf_counter() - self.begin)
        if failed:
            log.info("compiling: the first step does the rest (%s)", failed[0])
            return False
        with suppress(OSError):  # a full disk: the next start looks the pieces up again
            self.done.parent.mkdir(exist_ok=True)
            self.done.touch()
        return True

    def compile_all(self, calls, interval=20):
        """(number of calls compiled, [what went wrong with others, in words])."""
        tasks = {self.pool.submit(compile_pickled, pickle.dumps(call), self.device): call for call in calls}
        waiting, failed, told = set(tasks), [], time.perf_counter()
        while waiting:
            done, waiting = wait(waiting, max(0, told + interval - time.perf_counter()), FIRST_COMPLETED)
            for task in done:
                call = tasks.pop(task)
                if task.exception():
                    failed.append(first_line(task.exception()))
                    continue
                try:
                    call.compile(self.device)  # taken from the cache: torch knows it in this process from now on
                except RuntimeError as error:  # not kept: its traceback would keep the layer's copy
                    failed.append(first_line(error))
            if time.perf_counter() >= told + interval:
                told = time.perf_counter()
                seconds = told - self.begin
                log.info("compiling: %d of %d pieces after %.0f s", len(calls) - len(tasks), len(calls), seconds)
        return len(calls) - len(failed), failed


def room_for_processes(device):
    """(cores for this process of the run, how many processes these and the memory of machine and GPU have room for)."""
    here = count_processes_here()
    cores = len(os.sched_getaffinity(0)) // here
    most = [MOST_PROCESSES, cores, available_memory() // here // HOST_BYTES]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        most.append(free // GPU_BYTES)
    return cores, min(most)


@dataclass(frozen=True)
class TensorForm:
    """A tensor without its values."""

    shape: tuple
    stride: tuple
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, value):
        """Anything else is returned as it is."""
        if not torch.is_tensor(value):
            return value
        return cls(tuple(value.shape), value.stride(), value.dtype, value.requires_grad)

    def make(self, device):
        """With values that are left to chance; where it has a gradient, it is the result of something, as in a step."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return tensor.requires_grad_().clone() if self.requires_grad else tensor


@dataclass
class Call:
    """What is compiled, and all that it is compiled for."""

    function: object  # a part of a layer, see `libs.unet_walk.Parts`; None: the VAE's encoder
    module: nn.Module
    inputs: tuple  # TensorForms, and other values as they are
    grad: bool
    autocast: torch.dtype | None  # None: off

    def key(self):
        """Equal in calls for which torch compiles the same."""
        parameters = [(name, TensorForm.of(parameter)) for name, parameter in self.module.named_parameters()]
        return repr((self.function, self.module, parameters, self.inputs, self.grad, self.autocast))

    def compile(self, device):
        """Compile it for a forward and a backward pass, and run both, which chooses among forms of its kernels."""
        module = copy.deepcopy(self.module).to_empty(device=device)  # not in place: its memory ends with this call
        if self.function:
            run, inputs = compiling.compile_part(self.function), (module, *self.inputs)
        else:
            compiling.compile_encoder(module)
            run, inputs = module, self.inputs
        inputs = [value.make(device) if isinstance(value, TensorForm) else value for value in inputs]
        with torch.set_grad_enabled(self.grad):
            with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                output = run(*inputs)
            if output.requires_grad:
                output.backward(torch.empty_like(output))


def calls_of_a_step(model, encoder, step):
    """[Call] without doubles, those first that take longest. Nothing is computed."""
    calls = {}

    def note(function, module, inputs):
        device = inputs[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        call = Call(function, module, tuple(map(TensorForm.of, inputs)), torch.is_grad_enabled(), autocast)
        calls.setdefault(call.key(), call)

    def noting(compiled):
        def part(module, *inputs):
            note(compiled.__wrapped__, module, inputs)
            return compiled(module, *inputs)

        return part

    model.train()
    with ExitStack() as stack:
        for part_of in (model.unet_main, model.brushnet):
            stack.callback(setattr, part_of, "parts", part_of.parts)
            part_of.parts = Parts(*map(noting, vars(part_of.parts).values()))
        hook = encoder.register_forward_pre_hook(lambda module, inputs: note(None, module, inputs))
        stack.callback(hook.remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        step()
    for call in calls.values():
        call.module = without_values(call.module)
    return sorted(calls.values(), key=lambda call: (len(list(call.module.modules())), call.grad), reverse=True)


def without_values(module):
    """A copy on torch's "meta" device."""
    copies = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        copies[id(tensor)] = empty
    return copy.deepcopy(module, copies)


def start_process(device, threads, precision, compilers):
    """Make this process as its parent is, in all that torch's keys to its cache contain; and ready to compile."""
    # Keys name the first module that knows torch.channels_last, in the order of imports. The parent has no such module.
    sys.modules.pop("__mp_main__", None)
    for number in STOP_SIGNALS:  # the parent's, which a terminal or a job sends to all; this one ends with it
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # else some of torch would take memory of the first GPU too
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.fp32_precision = precision
    torch._inductor.config.compile_threads = compilers
    compiling.set_up_compiling()
    # Compiling something loads the compiler, and starts the processes that it has itself.
    compiling.compile_part(torch.square)(torch.ones(8, device=device, requires_grad=True)).sum().backward()


def end_with_parent():
    """Also where that is killed: a pool's processes would wait for more work for ever, and keep the GPU's memory."""
    multiprocessing.parent_process().join()
    os._exit(1)


def compile_pickled(call, device):
    pickle.loads(call).compile(device)
