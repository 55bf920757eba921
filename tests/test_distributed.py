"""Several processes and machines train as one: the same clips, losses and weights, and a clear end when one is lost."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from conftest import BF16, REPOSITORY, equal_files, wait_for_line
from torch.utils.data import DataLoader

from common.distributed import check_distributed, refuse_differences
from common.errors import InputError
from dataset.loader import EpochSampler
from libs.checkpoints.resume import BATCH_SETTINGS, global_batch
from libs.training.checks import check_run
from libs.training.config import parse_args
from libs.training.setup import what_must_agree
from train_DiffuEraser_stage1 import Stage1

FINAL = "unet_main/diffusion_pytorch_model.safetensors"


class Keys(torch.utils.data.Dataset):
    """Gives back the keys that the sampler asks for."""

    def __len__(self):
        return 1

    def __getitem__(self, key):
        return key


def shares(length, processes, batch, start, stop):
    """The batches of (epoch, index) keys that accelerate gives to each process."""
    sampler = EpochSampler(length, seed=42, start=start, stop=stop)
    loader = DataLoader(Keys(), batch, sampler=sampler, collate_fn=list)
    return [list(prepare_data_loader(loader, num_processes=processes, process_index=i)) for i in range(processes)]


@pytest.mark.parametrize("length", [45, 7, 1])
@pytest.mark.parametrize(
    ("processes", "batch", "accumulation"), [(1, 1, 1), (2, 1, 1), (3, 2, 1), (4, 1, 3), (2, 3, 2)]
)
def test_every_clip_once_per_epoch(length, processes, batch, accumulation):
    """Odd sizes: each process has its own part, together they have all of it, in steps of the global batch."""
    clips = global_batch(dict(zip(BATCH_SETTINGS, (processes, batch, accumulation), strict=True)))
    steps = -(-3 * length // clips)
    parts = shares(length, processes, batch, 0, steps * clips)
    assert {len(part) for part in parts} == {steps * accumulation}  # the same number in every process
    assert all(len(keys) == batch for part in parts for keys in part)
    counts = Counter(key for part in parts for keys in part for key in keys)
    assert all(counts[epoch, index] == 1 for epoch in range(3) for index in range(length))

    # A step holds the same clips however the global batch is divided, and a resumed run starts with the next ones.
    whole = shares(length, 1, clips, clips, steps * clips)[0]
    parts = shares(length, processes, batch, clips, steps * clips)
    for step, keys in enumerate(whole):
        own = slice(step * accumulation, (step + 1) * accumulation)
        assert sorted(keys) == sorted(key for part in parts for keys in part[own] for key in keys)


def test_machines_that_disagree_are_named(flags, videos, tmp_path, monkeypatch):
    """Where files lie may differ; what the result depends on may not."""

    class Accelerator:
        num_processes = 2

    def facts(**overrides):
        args = parse_args(Stage1, flags(1, **overrides))
        return what_must_agree(args, check_run(args, Stage1)[1], torch.device("cpu"))

    def compare(there):
        monkeypatch.setattr("common.distributed.gather_object", lambda here: [*here, there])
        refuse_differences(Accelerator, facts())

    (tmp_path / "elsewhere").symlink_to(videos)
    compare(facts(davis_root=tmp_path / "elsewhere/DAVIS", output_dir=tmp_path / "mine", dataloader_num_workers=1))
    validation = [f"['{videos}/DAVIS/{kind}/480p/buoy']" for kind in ("JPEGImages", "Annotations")]
    shutil.copytree(videos / "DAVIS", tmp_path / "shorter")
    sorted((tmp_path / "shorter/JPEGImages/480p").glob("*/*"))[0].unlink()
    masks, name = tmp_path / "masks", (videos / "DAVIS/ImageSets/2017/train.txt").read_text().split()[0]
    masks.mkdir()
    (masks / name).symlink_to(videos / "DAVIS/Annotations/480p" / name)
    for difference, message in (
        ({"davis_root": ""}, "the number of clips an epoch is 44 in process 0 and 4 in process 1: all machines need"),
        ({"lr_scheduler": "cosine"}, "--lr_scheduler is constant in process 0 and cosine in process 1"),
        (
            {"validation_image": validation[0], "validation_mask": validation[1]},
            "--validation_prompt is [] in process 0 and",
        ),
        ({"davis_root": tmp_path / "shorter"}, "the hash of the videos' names and lengths is "),
        ({"masks_of_videos": masks}, "the hash of the names of videos that masks are of is none in process 0 and "),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            compare(facts(**difference))


def test_bf16_weights_need_equal_gpus(flags, monkeypatch):
    """torch's random numbers on a GPU follow from its number of multiprocessors: with other ones, each process would
    round its weights in another way, and the replicas drift apart."""
    found = []
    for processors in (128, 132):
        model = SimpleNamespace(name="GPU", multi_processor_count=processors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, model=model: model)
        for settings in ({}, BF16):
            args = parse_args(Stage1, flags(1, **settings))
            found.append(what_must_agree(args, check_run(args, Stage1)[1], torch.device("cuda")))
    assert found[0] == found[2]
    monkeypatch.setattr("common.distributed.gather_object", lambda here: [found[1], found[3]])
    with pytest.raises(InputError, match=r"the GPU .* is GPU with 128 multiprocessors in process 0 and GPU with 132 "):
        refuse_differences(SimpleNamespace(num_processes=2), found[1])


@pytest.mark.parametrize(("local_rank", "line"), [(0, "error in process 8: /nowhere/JPEGImages"), (1, "")])
def test_every_machine_says_what_is_wrong(train, monkeypatch, capsys, local_rank, line):
    """One process of each machine does, into the machine's own log."""
    monkeypatch.setenv("RANK", str(8 + local_rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(SystemExit):
        train(1, davis_root="/nowhere")
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == bool(line)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("FSDP", "asks for fsdp, and accelerate shards on GPUs only"),
        ("DEEPSPEED", "asks for DeepSpeed, which is not supported: FSDP2 shards the same state with"),
    ],
)
def test_engines_that_cannot_run_here(train, monkeypatch, capsys, engine, message):
    """Without a GPU accelerate would run DDP instead, and say nothing."""
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        train(1)
    error = capsys.readouterr().err
    assert message in error and "ACCELERATE_CONFIG=configs/accelerate/" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "accumulation", "other"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, 1, "FSDP"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 1, "several machines"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 2, "--gradient_accumulation_steps on several GPUs"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 1, None),
        ({}, 2, None),
    ],
)
def test_where_a_cuda_graph_works(monkeypatch, variables, accumulation, other):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("common.distributed.gpu_is_used", lambda: True)
    args = SimpleNamespace(
        cuda_graph=True, compile=False, use_8bit_adam=False, ema_decay=None, gradient_accumulation_steps=accumulation
    )
    refused = pytest.raises(InputError, match=f"--cuda_graph does not go with {other}: drop it")
    with refused if other else nullcontext():
        check_distributed(args)


HOSTS = ("diffueraser0", "diffueraser1")


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two network namespaces with a link between them, as two machines on a network of their own."""
    if not shutil.which("ip") or ip("netns", "add", HOSTS[0]).returncode:
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("netns", "add", HOSTS[1])
        ip("link", "add", "dfe0", "netns", HOSTS[0], "type", "veth", "peer", "name", "dfe1", "netns", HOSTS[1])
        for i, host in enumerate(HOSTS):
            for command in (f"addr add 10.66.7.{i + 1}/24 dev dfe{i}", f"link set dfe{i} up", "link set lo up"):
                assert ip("-n", host, *command.split()).returncode == 0
        yield HOSTS
    finally:
        for host in HOSTS:
            ip("netns", "del", host)


def start_machines(hosts, environment, tmp_path):
    """The shell script on both machines, as a user starts it there."""
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host, "bash", "finetune_stage1.sh", "--logging_steps=1", "--report_to=none",
             "--distributed_timeout=5"],
            cwd=REPOSITORY,
            env={**environment, "NUM_MACHINES": "2", "MACHINE_RANK": str(i), "MAIN_ADDRESS": "10.66.7.1",
                 "GLOO_SOCKET_IFNAME": f"dfe{i}", "LOG": str(tmp_path / f"machine{i}.log")},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i, host in enumerate(hosts)
    ]  # fmt: skip


def test_two_machines_of_which_one_is_cut_off(hosts, weights, videos, tmp_path):
    """Both end with a line that says why; the same commands resume, and end bit for bit as one machine does."""
    environment = {
        **os.environ, "PYTHON": sys.executable, "WEIGHTS": str(weights), "DAVIS_ROOT": str(videos / "DAVIS"),
        "YTVOS_ROOT": str(videos / "YTBV"), "OUTPUT_DIR": str(tmp_path / "run"), "RESOLUTION": "32", "NFRAMES": "1",
        "VALIDATION_STEPS": "0", "DATALOADER_NUM_WORKERS": "0", "OMP_NUM_THREADS": "1", "CHECKPOINTING_STEPS": "2",
    }  # fmt: skip
    machines = start_machines(hosts, {**environment, "MAX_TRAIN_STEPS": "5000"}, tmp_path)
    wait_for_line(tmp_path / "machine0.log", "step 3/5000")
    ip("-n", hosts[1], "link", "set", "dfe1", "down")
    for machine in machines:
        _, error = machine.communicate(timeout=300)
        assert machine.returncode == 1
        assert re.search(
            r"^error.*another process has ended or cannot be reached \(Timed out waiting 5000ms", error, re.M
        )
    assert "Traceback" not in "".join((tmp_path / f"machine{i}.log").read_text() for i in (0, 1))

    ip("-n", hosts[1], "link", "set", "dfe1", "up")
    last = max(int(path.name.partition("-")[2]) for path in tmp_path.glob("run/checkpoint-*[0-9]"))
    environment["MAX_TRAIN_STEPS"] = str(last + 2)
    for machine in start_machines(hosts, environment, tmp_path):
        output, error = machine.communicate(timeout=300)
        assert machine.returncode == 0, output + error
    assert f"checkpoint-{last} at step {last}" in (tmp_path / "machine0.log").read_text()
    environment |= {"NUM_PROCESSES": "2", "OUTPUT_DIR": str(tmp_path / "one"), "LOG": str(tmp_path / "one.log")}
    one = subprocess.run(
        ["bash", "finetune_stage1.sh"], cwd=REPOSITORY, env=environment, capture_output=True, timeout=300
    )
    assert one.returncode == 0, one.stderr
    assert equal_files(tmp_path / "run" / FINAL, tmp_path / "one" / FINAL)
