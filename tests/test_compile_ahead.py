"""Layers compiled by other processes: the first step has them, and whatever goes wrong with them costs time only."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from common.hardware import available_memory
from libs.training import compile_ahead, setup
from libs.training.compile_ahead import (
    Call,
    CompileAhead,
    TensorForm,
    calls_of_a_step,
    room_for_processes,
    without_values,
)
from libs.training.compiling import compile_encoder, compile_models
from libs.training.config import parse_args
from libs.unet_walk import PARTS, LayerWalk, Parts
from train_DiffuEraser_stage1 import Stage1

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs it on CPUs")


class Models(nn.Module):
    """What there is of an Inpainter and a VAE: three equal layers, of which the first one's input has no gradient."""

    gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.unet_main, self.brushnet = (
            nn.ModuleList(ResnetBlock2D(in_channels=8, temb_channels=8, groups=4, dropout=0.1) for _ in range(count))
            for count in (3, 0)
        )
        compile_models((self.unet_main, self.brushnet), by_layer=True)
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)).requires_grad_(False)
        compile_encoder(self.encoder)

    def forward(self):
        sample = self.encoder(torch.ones(2, 3, 8, 8))
        for resnet in self.unet_main:
            sample = self.unet_main.parts.resnet(resnet, sample, None, torch.ones(2, 8))
        return sample.sum()


def main():
    """A process of its own, whose imports are in a run's order."""
    compile_ahead.room_for_processes = lambda device: (2, 2)
    models = Models()
    ahead, state = CompileAhead(CPU, "models"), torch.get_rng_state()
    print("processes", ahead.processes)
    if ahead.processes:
        ahead.compile_step(models, models.encoder, models)
    assert torch.equal(torch.get_rng_state(), state)
    graphs, found = torch._dynamo.utils.counters["stats"], torch._dynamo.utils.counters["aot_autograd"]
    before = graphs["unique_graphs"]
    models().backward()
    print("found", found["autograd_cache_hit"], "compiled", found["autograd_cache_miss"])
    print("in the first step", graphs["unique_graphs"] - before)


def run_main(tmp_path, main="main", timeout=600):
    run = f"if __name__ == '__main__':\n    import test_compile_ahead\n    test_compile_ahead.{main}()\n"
    (tmp_path / "run.py").write_text(f"import common.libraries\nimport torch\n{run}")
    tests = Path(__file__).parent
    paths = os.pathsep.join(map(str, (tests.parent, tests)))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": paths}
    command = [sys.executable, str(tmp_path / "run.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@needs_compiler
def test_the_first_step_has_nothing_to_compile(tmp_path):
    """The encoder, the first layer, and once those with a gradient; a later start begins no processes, and finds them
    in its first step."""
    first, second = (run_main(tmp_path).stdout.splitlines()[-3:] for _ in range(2))
    assert first == ["processes 2", "found 3 compiled 0", "in the first step 0"]
    assert second == ["processes 0", "found 3 compiled 0", "in the first step 3"]


def test_what_a_step_compiles():
    models = Models()
    weights, parts = [*models.parameters()], [models.unet_main.parts, models.brushnet.parts]
    calls = calls_of_a_step(models, models.encoder, models)
    assert len(calls) == 3
    assert [call.function for call in calls].count(None) == 1
    assert sorted(value.requires_grad for call in calls for value in call.inputs[:1]) == [False, False, True]
    for call in calls:
        assert {tensor.device.type for tensor in call.module.parameters()} == {"meta"}
        assert all(isinstance(value, TensorForm) or value is None for value in call.inputs)
    # The step itself has left nothing behind.
    assert [models.unet_main.parts, models.brushnet.parts] == parts
    assert all(found is weight for found, weight in zip(models.parameters(), weights, strict=True))
    assert not models.encoder._forward_pre_hooks


@pytest.mark.parametrize("stage", [1, 2])
def test_training_runs_what_was_foreseen(stage, train, tmp_path, monkeypatch):
    """The same layers, inputs and memory formats; and FakeTensors stay out of training."""
    foreseen, run = set(), set()

    def noting(part):
        @wraps(part)
        def noted(module, *inputs):
            if module.training:  # not what the held-out loss runs
                run.add(Call(part, module, tuple(map(TensorForm.of, inputs)), torch.is_grad_enabled(), None).key())
            return part(module, *inputs)

        return noted

    def foresee(model, encoder, step):
        calls = calls_of_a_step(model, encoder, step)
        foreseen.update(call.key() for call in calls if call.function)
        assert len(foreseen) == len(calls) - 1  # the encoder
        run.clear()

    monkeypatch.setattr(LayerWalk, "parts", Parts(*map(noting, vars(PARTS).values())))
    ahead = object.__new__(CompileAhead)
    ahead.processes, ahead.compile_step = 2, foresee
    monkeypatch.setattr("libs.training.loop.start_compiling", lambda *args: nullcontext(ahead))
    train(stage, output_dir=tmp_path / "run", max_train_steps=1)
    assert run == foreseen and len(run) >= 10


def test_copies_without_values():
    module = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4))
    module[0].bias.requires_grad_(False)
    copied = without_values(module)
    for (name, tensor), (other, found) in zip(
        [*module.named_parameters(), *module.named_buffers()],
        [*copied.named_parameters(), *copied.named_buffers()],
        strict=True,
    ):
        assert name == other and type(found) is type(tensor) and found.device.type == "meta"
        assert TensorForm.of(found) == TensorForm.of(tensor)


def test_tensors_by_their_form():
    sample = torch.randn(2, 3, 4, 5, dtype=torch.half).to(memory_format=torch.channels_last)
    for tensor in (sample, sample.clone().requires_grad_()):
        made = TensorForm.of(tensor).make(CPU)
        assert TensorForm.of(made) == TensorForm.of(tensor)
        assert made.is_leaf == (not tensor.requires_grad)
    assert TensorForm.of(3) == 3


@pytest.fixture
def ahead(tmp_path, monkeypatch):
    """A CompileAhead in this process, and what it says."""
    lines = []
    monkeypatch.setattr(compile_ahead, "log", SimpleNamespace(info=lambda *args: lines.append(args[0] % args[1:])))
    ahead = object.__new__(CompileAhead)
    ahead.device, ahead.begin, ahead.processes, ahead.done = CPU, 0, 2, tmp_path / "diffueraser" / "key"
    ahead.pool, ahead.started = ThreadPoolExecutor(1), set()
    return ahead, lines


def test_what_fails_is_left_to_the_first_step(ahead, monkeypatch):
    def fail_for_the_encoder(call, device):
        if call.function is None:
            raise torch.OutOfMemoryError("no room")

    ahead, lines = ahead
    monkeypatch.setattr(Call, "compile", fail_for_the_encoder)
    models = Models()
    assert not ahead.compile_step(models, models.encoder, models)
    assert lines[0].startswith("compiled 2 pieces") and lines[1] == "compiling: the first step does the rest (no room)"
    assert not ahead.done.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_layers_copies_end_with_their_call(ahead, monkeypatch, fails):
    """On a GPU their weights and gradients would take the memory of those that train, after a failure for long."""
    ahead, lines = ahead
    monkeypatch.setattr(compile_ahead, "compile_pickled", lambda call, device: None)
    models, copies, alive = Models(), [], []

    def run(module, *inputs):
        alive.append(sum(copied() is not None for copied in copies))
        copies.append(weakref.ref(next(module.parameters())))
        if fails:
            raise torch.OutOfMemoryError("no room")
        return inputs[0].sum()

    monkeypatch.setattr(compile_ahead.compiling, "compile_part", lambda function: run)
    monkeypatch.setattr(compile_ahead.compiling, "compile_encoder", lambda encoder: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(sum(copied() is not None for copied in copies)))
    assert ahead.compile_step(models, models.encoder, models) != fails
    assert alive == [0, 0, 0] and len(copies) == 2
    assert lines[0].startswith(f"compiled {1 if fails else 3} pieces")


def test_a_step_that_cannot_be_foreseen(ahead):
    ahead, lines = ahead
    models = Models()
    assert not ahead.compile_step(models, models.encoder, lambda: float(torch.ones(1)))  # a FakeTensor has no value
    assert lines[0].startswith("compiled 0 pieces") and "the first step does the rest" in lines[1]
    assert not ahead.done.exists()


def test_processes_that_cannot_be_started(ahead, monkeypatch, tmp_path):
    """As in a container whose number of processes is limited."""

    def refuse(process):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    _, lines = ahead
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_ahead, "room_for_processes", lambda device: (2, 2))
    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", refuse)
    models = Models()
    with CompileAhead(CPU, "models") as started:
        assert not started.compile_step(models, models.encoder, models)
    assert lines[-1].startswith("compiling: the first step does the rest ([Errno 11] Resource")


def test_all_is_compiled_once_for_a_machine(ahead, monkeypatch):
    ahead, lines = ahead
    monkeypatch.setattr(Call, "compile", lambda call, device: None)
    models = Models()
    assert ahead.compile_step(models, models.encoder, models)
    assert len(lines) == 1 and ahead.done.exists()


def test_a_disk_without_room_for_the_note(ahead, monkeypatch):
    ahead, lines = ahead
    monkeypatch.setattr(Call, "compile", lambda call, device: None)
    ahead.done.parent.write_text("")  # where its folder would be
    models = Models()
    ahead.compile_step(models, models.encoder, models)
    assert lines[0].startswith("compiled 3 pieces")


@pytest.mark.parametrize("setting", ["allow_tf32", "bf16_weights"])
def test_settings_that_change_what_is_compiled(setting, monkeypatch):
    """The note that all was compiled is another one then."""
    told = []
    monkeypatch.setattr(setup, "CompileAhead", lambda device, what: told.append(what))
    for on in (False, True):
        setup.start_compiling(*compiled_run({setting: on}, step=0))
    assert told[0] != told[1]


def compiled_run(settings, step):
    config = parse_args(Stage1, ["--max_train_steps=2"])
    vars(config).update(compile=True, cuda_graph=True, **settings)
    found = SimpleNamespace(opened={}, base=SimpleNamespace(vae_config={}), state=SimpleNamespace(global_step=step))
    return config, Stage1, SimpleNamespace(device=CPU), found


def test_a_run_without_a_step_left_compiles_nothing(monkeypatch):
    """As that of a chain of stages which is queued anew during the second one."""
    begun = []
    monkeypatch.setattr(setup, "CompileAhead", lambda device, what: begun.append(what) or nullcontext())
    for step in (1, 2):
        setup.start_compiling(*compiled_run({}, step))
    assert len(begun) == 1


@pytest.mark.parametrize("begun", [False, True])
def test_a_failure_ends_the_processes(ahead, begun):
    """Before `run` and in it, also those that ignore the signal by which a pool ends its processes."""
    ahead, _ = ahead
    spawn = multiprocessing.get_context("spawn")
    ahead.pool = ProcessPoolExecutor(1, spawn, signal.signal, (signal.SIGTERM, signal.SIG_IGN))
    others = set(multiprocessing.active_children())
    never = ahead.pool.submit(signal.pause)
    ahead.started = set(multiprocessing.active_children()) - others
    models = Models()
    with pytest.raises(ZeroDivisionError), ahead:
        if begun:
            ahead.compile_step(models, models.encoder, lambda: float(torch.ones(1)))
        1 / 0  # noqa: B018
    assert isinstance(never.exception(), BrokenProcessPool)
    assert not ahead.started & set(multiprocessing.active_children())


def start_and_die():
    compile_ahead.room_for_processes = lambda device: (2, 2)
    ahead = CompileAhead(CPU, "models")
    ahead.pool.submit(int).result()
    print("started", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


@needs_compiler
def test_processes_end_with_a_run_that_is_killed(tmp_path):
    """They hold on to its output: it ends when they do."""
    assert run_main(tmp_path, "start_and_die", timeout=120).stdout.splitlines()[-1] == "started"


@pytest.mark.parametrize(("cores", "gib", "processes"), [(16, 64, 8), (4, 64, 4), (16, 20, 3), (1, 64, 1), (0, 64, 0)])
def test_room_for_processes(monkeypatch, cores, gib, processes):
    """16 cores compile in 8 processes, with two compilers each."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(compile_ahead, "available_memory", lambda: gib * 2**30)
    assert room_for_processes(CPU) == (cores, processes)


def test_memory_within_a_container(tmp_path):
    """The limit of any group around this one; what files' pages take of it is given back."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    machine = available_memory(tmp_path)
    for group, limit, current, pages in ((inner, "max", 0, 0), (inner.parent, 9000, 5000, 1000)):
        for name, text in ("max", limit), ("current", current), ("stat", f"anon 4000\ninactive_file {pages}"):
            (group / f"memory.{name}").write_text(f"{text}\n")
    assert available_memory(inner) == 5000 < machine
    (inner / "memory.max").write_text("10")
    (inner / "memory.current").write_text("20")
    assert available_memory(inner) == 0


def test_a_single_core_compiles_in_its_first_step(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert CompileAhead(CPU, "models").processes == 0


@pytest.mark.parametrize("setting", [{"fx_graph_cache": False}, {"force_disable_caches": True}])
def test_no_processes_without_a_cache(setting, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_ahead, "room_for_processes", lambda device: (2, 2))
    monkeypatch.setattr(compile_ahead, "ProcessPoolExecutor", lambda *args: pytest.fail("processes"))
    with torch._inductor.config.patch(setting):
        assert CompileAhead(CPU, "models").processes == 0
