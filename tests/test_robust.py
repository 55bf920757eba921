"""What goes wrong in long runs: signals, broken files, losses that are no numbers, full disks, changed settings."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import REPOSITORY, equal_files, error_line
from PIL import Image
from torch.optim import AdamW

import libs.training.loop
import libs.training.loss
from common.errors import InputError, one_line, one_line_errors
from common.files import written_whole
from dataset.finetune_dataset import FinetuneDataset
from dataset.folders import scan_video
from dataset.loader import TrainingClips
from libs.training.latent_cache import LatentCache
from libs.training.optimizer import match_layout
from libs.training.stopping import StopRequest


def steps_of(output):
    return [int(step) for step in re.findall(r"step (\d+)/\d+  loss", output)]


def scale_gradients(monkeypatch):
    """As only fp16 does, which a CPU does not have."""
    make = libs.training.loop.make_accelerator

    def make_with_scaler(args):
        accelerator = make(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        return accelerator

    monkeypatch.setattr(libs.training.loop, "make_accelerator", make_with_scaler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(train, tmp_path, capsys, monkeypatch, number):
    """The trainer ends with a checkpoint and without an error; resuming ends where an undisturbed run does."""
    before = signal.getsignal(number)
    train(1, output_dir=tmp_path / "whole", max_train_steps=4)
    capsys.readouterr()
    loss = libs.training.loss.denoising_loss

    def interrupted(*args):
        os.kill(os.getpid(), number)
        return loss(*args)

    monkeypatch.setattr(libs.training.loss, "denoising_loss", interrupted)
    train(1, max_train_steps=4, resume_from_checkpoint="latest")
    output = capsys.readouterr().out
    assert steps_of(output) == [1] and f"stopped by {number.name} at step 1" in output
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert signal.getsignal(number) is before
    monkeypatch.setattr(libs.training.loss, "denoising_loss", loss)
    train(1, max_train_steps=4, resume_from_checkpoint="latest")
    final = "unet_main/diffusion_pytorch_model.safetensors"
    assert equal_files(tmp_path / "whole" / final, tmp_path / "run" / final)


def test_the_stop_file(train, tmp_path, capsys, monkeypatch):
    """`touch stop` in the output folder does what a signal does; one that an earlier run has left does nothing."""
    file = tmp_path / "run/stop"
    file.parent.mkdir()
    file.write_text("SIGTERM")
    loss, calls = libs.training.loss.denoising_loss, []

    def touched(*args):
        calls.append(args)
        if len(calls) == 2:
            file.touch()
        return loss(*args)

    monkeypatch.setattr(libs.training.loss, "denoising_loss", touched)
    train(1, max_train_steps=4)
    output = capsys.readouterr().out
    assert steps_of(output) == [1, 2] and f"stopped by the file {file} at step 2" in output
    assert not file.exists()


def test_a_signal_beside_the_stop_file_is_no_second_one(tmp_path):
    """SLURM sends its signal to all processes of a job: to the launcher, which writes the file, and to the trainer."""
    with StopRequest(tmp_path) as stop:
        Path(tmp_path, "stop").write_text("SIGUSR1")
        assert stop.signal == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == "SIGUSR1"


@pytest.mark.parametrize(("rank", "local_rank"), [(1, 1), (8, 0)])  # (8, 0): the first of the second machine
def test_only_the_first_process_removes_the_stop_file(tmp_path, monkeypatch, rank, local_rank):
    """Another one that starts or ends a little later would take a request away."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    Path(tmp_path, "stop").write_text("SIGTERM\n")
    with StopRequest(tmp_path) as stop:
        assert stop.signal == "SIGTERM"
    assert Path(tmp_path, "stop").exists()


def test_a_job_s_signals_at_a_loader_worker(tmp_path):
    """It has the trainer's handlers, being forked, and works on until the trainer ends it."""

    def work():
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        Path(tmp_path, "alive").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    with StopRequest(tmp_path):
        worker = get_context("fork").Process(target=work)
        worker.start()
        worker.join()
    assert worker.exitcode == -signal.SIGTERM and Path(tmp_path, "alive").exists()


def test_processes_stop_together(tmp_path, monkeypatch):
    """At steps that are logged, where all of them ask; one that has had no signal says that another has."""
    others, asked, config = 0, [], SimpleNamespace(logging_steps=10)
    monkeypatch.setattr(libs.training.loop, "sum_over_processes", lambda _, own: asked.append(own) or own + others)
    stop = StopRequest(tmp_path)

    def must_stop(step):
        return libs.training.loop.must_stop(config, SimpleNamespace(num_processes=2), step, stop)

    assert not must_stop(10) and asked == [False]
    others = 1
    assert not must_stop(11) and len(asked) == 1  # else this process would wait for one that does not ask
    assert must_stop(20) and stop.signal == "a signal to another process"
    stop.received = "SIGTERM"
    assert must_stop(30) and stop.signal == "SIGTERM"


def test_storage_that_stumbles_does_not_end_a_run(tmp_path, monkeypatch):
    with StopRequest(tmp_path) as stop:
        monkeypatch.setattr(Path, "read_text", mock.Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
        assert stop.signal is None
        monkeypatch.undo()
        Path(tmp_path, "stop").write_text("SIGUSR1")
        assert stop.signal == "SIGUSR1"


@pytest.mark.parametrize("resume", ["latest", ""])  # "": an empty RESUME_FROM_CHECKPOINT
def test_a_checkpoint_saved_between_the_checks_and_the_lock(train, tmp_path, capsys, monkeypatch, resume):
    """By a run that was just ending: training those steps again would waste them without a word."""
    train(1, max_train_steps=2)
    check, kept = libs.training.loop.check_run, tmp_path / "kept"
    (tmp_path / "run/checkpoint-2").rename(kept)

    def check_and_lose_the_race(*args):
        found = check(*args)
        kept.rename(tmp_path / "run/checkpoint-2")
        return found

    monkeypatch.setattr(libs.training.loop, "check_run", check_and_lose_the_race)
    with pytest.raises(SystemExit):
        train(1, max_train_steps=3, resume_from_checkpoint=resume)
    assert "run/checkpoint-2 has been written meanwhile: run the same command again" in capsys.readouterr().err


def test_a_second_signal_ends_the_trainer(tmp_path):
    """At once, where it is another one and not the first passed on by torch's launcher."""
    code = """import os, signal, sys, time
from libs.training.stopping import SAME_REQUEST, StopRequest
with StopRequest(sys.argv[1]) as stop:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    stop.signalled_at -= SAME_REQUEST
    print("alive", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive", flush=True)"""
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGTERM and ended.stdout == "alive\n"


@pytest.mark.parametrize("processes", [1, 2])
def test_the_shell_script_passes_a_signal_on(weights, videos, tmp_path, processes):
    """Ctrl-C or SLURM's signal at the shell script: exit status 0, a checkpoint, a line that says how to go on."""
    log = tmp_path / "run.log"
    environment = {
        **os.environ, "PYTHON": sys.executable, "WEIGHTS": str(weights), "DAVIS_ROOT": str(videos / "DAVIS"),
        "YTVOS_ROOT": str(videos / "YTBV"), "OUTPUT_DIR": str(tmp_path / "run"), "LOG": str(log), "RESOLUTION": "32",
        "NFRAMES": "2", "MAX_TRAIN_STEPS": "5000", "VALIDATION_STEPS": "0", "DATALOADER_NUM_WORKERS": "1",
        "NUM_PROCESSES": str(processes), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    script = subprocess.Popen(
        ["bash", "finetune_stage1.sh", "--logging_steps=1", "--report_to=none"],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    follow = subprocess.Popen(
        ["tail", "-n", "+1", "-F", str(log)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        for line in follow.stdout:
            if "step 2/5000" in line:
                break
        if processes == 1:
            with open(log, "a") as file:  # that of a long run
                file.write("2026-01-01 00:00:00  step 3/5000  loss 0.1000\n" * 10000)
        else:
            log = log.rename(tmp_path / "run.log.1")  # as logs are rotated
        script.send_signal(signal.SIGTERM)
        output, _ = script.communicate(timeout=300)
    finally:
        script.send_signal(signal.SIGTERM)  # the second one ends everything
        follow.kill()
        follow.communicate()
    assert script.returncode == 0, output + log.read_text()
    assert "stopped by SIGTERM at step" in log.read_text() and "Traceback" not in log.read_text()
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def write_frames(folder, count=6, size=(80, 64)):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{i:05d}.jpg")
    return sorted(folder.iterdir())


def cut(path):
    path.write_bytes(path.read_bytes()[:-700])


DAMAGES = {
    "truncated": (cut, "is cut short"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "lfs_pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer",
    ),
    "no_image": (lambda path: path.write_bytes(b"GIF89a nonsense"), "is no readable image"),
    "another_size": (lambda path: Image.new("RGB", (40, 32)).save(path), "is 40x32, 0000.* is 80x64"),
}


def test_frames_and_their_masks_in_one_folder(tmp_path):
    """They are no video; the hidden files of macOS are not counted."""
    write_frames(tmp_path / "good")
    (tmp_path / "good/._00000.jpg").write_bytes(b"AppleDouble")
    assert len(scan_video(tmp_path / "good").frames) == 6
    write_frames(tmp_path / "mixed", count=2)
    Image.new("L", (80, 64)).save(tmp_path / "mixed/00001.png")
    assert "holds 00001.jpg and 00001.png: one picture per frame" in scan_video(tmp_path / "mixed").broken


def test_two_runs_in_one_folder(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    other = "import sys; from common.files import locked\nwith locked(sys.argv[1]): print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", other, tmp_path / "run"], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        with pytest.raises(SystemExit):
            train(1)
        assert re.match("error: another run is writing to .*run: stop it, or choose", capsys.readouterr().err)
    train(1, max_train_steps=1)


@pytest.mark.parametrize("name", DAMAGES)
def test_broken_frames_are_named_and_replaced(tmp_path, name):
    """A clip of a broken video is replaced by one that follows from (seed, epoch, index) alone."""
    from types import SimpleNamespace

    damage, message = DAMAGES[name]
    root = tmp_path / "YTBV" / "JPEGImages"
    for video in ("a", "b", "c"):
        write_frames(root / video)
    damage(root / "b" / "00003.jpg")
    args = SimpleNamespace(davis_root="", ytvos_root=tmp_path / "YTBV", nframes=6, resolution=32)
    dataset = FinetuneDataset(args)
    clips = TrainingClips(dataset)
    clip = clips[4, 1]
    assert clip.video in ("a", "c")
    assert len(clip.broken) >= 1 and re.search(f"b: .*00003.jpg {message}", clip.broken[0])
    assert clips[4, 1].noise_seed == TrainingClips(FinetuneDataset(args))[4, 1].noise_seed
    with pytest.raises(InputError, match=message):
        dataset.clip(1, 4)


def test_training_goes_on_without_a_broken_video(train, videos, tmp_path, capsys):
    ytvos = tmp_path / "YTBV"
    for video in range(8):
        write_frames(ytvos / "JPEGImages" / str(video))
    cut(ytvos / "JPEGImages/3/00002.jpg")
    settings = {"davis_root": "", "ytvos_root": ytvos, "nframes": 6, "max_train_steps": 8, "train_batch_size": 1}
    train(1, **settings, dataloader_num_workers=1)
    output = capsys.readouterr().out
    assert steps_of(output) == list(range(1, 9))
    assert output.count("left out, another clip in its place: 3: ") == 1

    frame = ytvos / "JPEGImages/4/00003.jpg"
    frame.unlink()
    frame.symlink_to("nowhere")
    train(1, **settings, output_dir=tmp_path / "scanned", scan_data=True)
    output = capsys.readouterr().out
    assert "6 clips an epoch; 2 left out: broken, such as" in output and "another clip" not in output
    assert re.findall(r"^broken: .*/JPEGImages/(\S+)", output, re.M) == ["3/00002.jpg", "4/00003.jpg"]
    remembered = json.loads((tmp_path / "scanned/scan.json").read_text())
    assert len(remembered) == 8 and sum(reason is not None for _, reason in remembered.values()) == 2

    for video in range(3):
        cut(ytvos / f"JPEGImages/{video}/00000.jpg")
    with pytest.raises(SystemExit):
        train(1, **{**settings, "max_train_steps": 40}, output_dir=tmp_path / "many")
    assert "of the clips met came from broken videos" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(tmp_path):
    from types import SimpleNamespace

    for video in ("a", "b"):
        write_frames(tmp_path / "JPEGImages" / video)
    (tmp_path / "JPEGImages/b").chmod(0)
    dataset = FinetuneDataset(SimpleNamespace(davis_root="", ytvos_root=tmp_path, nframes=6, resolution=32))
    assert len(dataset) == 1 and "cannot be listed" in dataset.left_out[0]


def test_a_linked_video_whose_target_is_gone_is_counted(tmp_path):
    write_frames(tmp_path / "JPEGImages/a")
    Path(tmp_path, "JPEGImages/b").symlink_to("/nowhere/b")
    dataset = FinetuneDataset(SimpleNamespace(davis_root="", ytvos_root=tmp_path, nframes=6, resolution=32))
    assert len(dataset) == 1 and "b cannot be listed (No such file or directory)" in dataset.left_out[0]


def test_losses_that_are_no_numbers_stop_the_run(train, tmp_path, capsys, monkeypatch):
    train(1, max_train_steps=2, checkpointing_steps=1)
    loss, calls = libs.training.loss.denoising_loss, []

    def bad(*args):
        calls.append(args)
        return loss(*args) * (float("nan") if len(calls) > 1 else 1)

    monkeypatch.setattr(libs.training.loss, "denoising_loss", bad)
    with pytest.raises(SystemExit) as stop:
        train(1, max_train_steps=40, checkpointing_steps=1, resume_from_checkpoint="latest", logging_steps=3)
    captured = capsys.readouterr()
    assert stop.value.code == 1
    assert re.search(r"error: the loss is not finite since step 4 \(clip of \w+\); .*checkpoint-3", captured.err)
    assert "no checkpoint at step 5: the last 2 losses are not finite" in captured.out
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.fixture
def quota():
    """Bytes -> no file may grow beyond them; None lifts that. What a full disk or a quota does to writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    limit(None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
@pytest.mark.parametrize("size", [0, 20_000, 4_000_000], ids=["at_once", "small_files_only", "within_the_weights"])
def test_a_full_disk(train, tmp_path, capsys, monkeypatch, quota, size):
    """A checkpoint that cannot be written is said and tried again; at the end it is an error; earlier ones stay."""
    train(1, max_train_steps=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if "checkpoint-1" in str(path.parent)}
    loss = libs.training.loss.denoising_loss

    def fill_disk(*args):
        quota(size)
        return loss(*args)

    monkeypatch.setattr(libs.training.loss, "denoising_loss", fill_disk)
    with pytest.raises(SystemExit) as stop:
        train(1, max_train_steps=3, checkpointing_steps=1, resume_from_checkpoint="latest", report_to="tensorboard")
    quota(None)
    captured = capsys.readouterr()
    assert stop.value.code == 1
    assert "checkpoint of step 2 could not be written (" in captured.out and steps_of(captured.out)[-1] == 3
    assert captured.err.startswith("error: checkpoint of step 3 could not be written") and captured.err.count("\n") == 1
    assert captured.out.count("tensorboard gets no more values in this start, training goes on: ") == (size == 0)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1"]
    monkeypatch.undo()
    train(1, max_train_steps=3, resume_from_checkpoint="latest")
    assert (tmp_path / "run/checkpoint-3/trainer_state.json").is_file()


def test_changed_settings_on_resuming(train, tmp_path, capsys, weights, videos):
    train(1, max_train_steps=1)
    renamed = tmp_path / "YTBV"
    shutil.copytree(videos / "YTBV", renamed)
    next((renamed / "JPEGImages").iterdir()).rename(renamed / "JPEGImages/another")
    for change, message in (
        ({"nframes": 4}, "nframes 3, now 4"),
        ({"seed": 7}, "seed 42, now 7"),
        ({"train_batch_size": 2}, "train_batch_size 1, now 2"),
        ({"davis_root": ""}, "clips an epoch 44, now 4"),
        ({"ytvos_root": renamed}, "videos, by a hash of names and lengths, "),
        ({"pretrained_stage1_path": None}, "weights of unet_main from"),
    ):
        with pytest.raises(SystemExit) as stop:
            train(1, max_train_steps=2, resume_from_checkpoint="latest", check_only=True, **change)
        assert stop.value.code == 1 and message in capsys.readouterr().out
        with pytest.raises(SystemExit):
            train(1, max_train_steps=2, resume_from_checkpoint="latest", **change)
        error = capsys.readouterr().err
        assert message in error and "--resume_anyway" in error and error.count("\n") == 1
    train(1, max_train_steps=2, resume_from_checkpoint="latest", learning_rate=3e-5)
    output = capsys.readouterr().out
    assert "changed since the checkpoint: learning_rate from 0.001 to 3e-05" in output and "lr 3e-05" in output
    train(1, max_train_steps=3, resume_from_checkpoint="latest", learning_rate=3e-5, seed=7, resume_anyway=True)
    assert steps_of(capsys.readouterr().out) == [3]
    assert len(json.loads((tmp_path / "run/config.json").read_text())) == 3


def test_the_optimizer_follows_its_flags_on_resuming(train, tmp_path, capsys):
    train(1, max_train_steps=1)
    train(1, max_train_steps=2, resume_from_checkpoint="latest", adam_weight_decay=0, adam_beta1=0.5)
    output = capsys.readouterr().out
    assert "changed since the checkpoint: adam_beta1 from 0.9 to 0.5" in output
    state = torch.load(tmp_path / "run/checkpoint-2/optimizer.bin", weights_only=True)
    assert [(group["betas"], group["weight_decay"]) for group in state["param_groups"]] == [((0.5, 0.999), 0)]


def test_a_run_goes_on_where_the_optimizer_is_fused(train, tmp_path, monkeypatch):
    """Begun on a CPU: of a kernel that is not fused, torch refuses to scale gradients by fp16's scaler."""
    train(1, max_train_steps=1)
    scale_gradients(monkeypatch)
    make_optimizer = "libs.training.setup.make_optimizer"
    monkeypatch.setattr(make_optimizer, lambda args, weights, rate, device: AdamW(weights, rate, fused=True))
    train(1, max_train_steps=2, resume_from_checkpoint="latest")
    state = torch.load(tmp_path / "run/checkpoint-2/optimizer.bin", weights_only=True)
    assert [group["fused"] for group in state["param_groups"]] == [True]

    weight = torch.nn.Parameter(torch.empty(2, device="meta"))  # on a GPU, say
    for fused, device in ((True, "meta"), (False, "cpu")):
        groups, states = [{"params": [weight], "fused": fused}], {weight: {"step": torch.tensor(1.0)}}
        match_layout(SimpleNamespace(param_groups=groups, state=states))
        assert states[weight]["step"].device.type == device


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("use_8bit_adam", "state of 8-bit AdamW, this run's is fp32 AdamW: add --use_8bit_adam, or convert"),
        ("bf16_weights", "state of bf16 weights, this run's is fp32 weights: add --bf16_weights, or convert"),
    ],
)
def test_optimizer_state_of_another_form_is_refused(train, tmp_path, capsys, flag, message):
    train(1, max_train_steps=1)
    file = tmp_path / "run/checkpoint-1/trainer_state.json"
    file.write_text(file.read_text().replace(f'"{flag}": false', f'"{flag}": true'))
    with pytest.raises(SystemExit):
        train(1, max_train_steps=2, resume_from_checkpoint="latest", resume_anyway=True)
    error = capsys.readouterr().err
    assert f"holds optimizer {message}" in error


def test_a_loader_workers_error_says_what_it_was(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LatentCache, "key", lambda cache, path: os.stat("/gone/00001.jpg"))
    error = error_line(capsys, train, 1, latent_cache=tmp_path / "cache", dataloader_num_workers=1)
    assert error == "error: FileNotFoundError: [Errno 2] No such file or directory: '/gone/00001.jpg'"


def test_out_of_memory_is_one_line(train, tmp_path, capsys, monkeypatch):
    message = (
        "CUDA out of memory. Tried to allocate 26.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 6.12 MiB is "
        "free. Including non-PyTorch memory, this process has 79.16 GiB memory in use.\nSee the documentation"
    )

    def fail(*args):
        raise torch.OutOfMemoryError(message)

    monkeypatch.setattr(libs.training.loss, "denoising_loss", fail)
    with pytest.raises(SystemExit) as stop:
        train(1)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert error.startswith("error: CUDA out of memory. Tried to allocate 26.00 MiB. GPU 0 has a total capacity of")
    assert "6.12 MiB is free: use fewer frames at once (--nframes), " in error and "LOW_MEMORY=1" in error


def test_fp16_may_be_turned_on_and_off(train, tmp_path, capsys, monkeypatch):
    """With the gradient scaler that only fp16 has: a checkpoint without its state, then one with it."""
    train(1, max_train_steps=1)
    scale_gradients(monkeypatch)
    train(1, max_train_steps=2, resume_from_checkpoint="latest")
    assert torch.load(tmp_path / "run/checkpoint-2/scaler.pt", weights_only=True)["scale"] == 2.0
    monkeypatch.undo()
    train(1, max_train_steps=3, resume_from_checkpoint="latest")
    assert steps_of(capsys.readouterr().out) == [1, 2, 3]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_overflows_counts_for_the_schedule(train, capsys, monkeypatch, recwarn, fused):
    """The scaler leaves the weights alone then, which accelerate cannot see of a fused optimizer."""
    weights = []

    def make_optimizer(args, parameters, learning_rate, device):
        return AdamW(parameters, learning_rate, fused=fused)

    def overflow_at_first(self, batch):
        loss = forward_backward(self, batch)
        parameter = next(parameter for parameter in self.model.parameters() if parameter.grad is not None)
        weights.append(parameter.detach().clone())
        if len(weights) == 1:
            parameter.grad.fill_(torch.inf)
        return loss

    forward_backward = libs.training.loss.ForwardBackward.__call__
    scale_gradients(monkeypatch)
    monkeypatch.setattr(libs.training.setup, "make_optimizer", make_optimizer)
    monkeypatch.setattr(libs.training.loss.ForwardBackward, "__call__", overflow_at_first)
    train(1, max_train_steps=4, learning_rate=1e-5, lr_scheduler="linear", lr_warmup_steps=2)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[3])
    rates = re.findall(r"lr (\S+)", capsys.readouterr().out)
    assert rates == ["5e-06", "1e-05", "5e-06", "0"]  # the last step of the run is the schedule's last
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_a_full_disk_while_writing_json(tmp_path):
    """The error of a write, unlike that of opening a file, does not say which one it was."""
    with pytest.raises(OSError, match="No space left") as raised, written_whole(tmp_path / "a.json"):
        Path("/dev/full").write_text("x")
    expected = f"{tmp_path}/a.json: No space left on device: free some space, or write to another disk"
    assert one_line(raised.value) == expected and not list(tmp_path.iterdir())


def test_a_library_s_error_while_writing_keeps_its_words(tmp_path):
    """Pillow's, for one, are OSErrors of a text alone."""
    with pytest.raises(OSError, match="encoder error -2") as raised, written_whole(tmp_path / "a.gif"):
        raise OSError("encoder error -2 when writing image file")
    assert one_line(raised.value) == "encoder error -2 when writing image file"


def test_output_that_nobody_reads_any_more():
    """Left in the buffer at the end, as of `--help | head -1`: without a word."""
    code = "from common.errors import one_line_errors; one_line_errors(lambda: print('unread'))()"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, "PYTHONUNBUFFERED": ""},
                               stdout=closed, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert ended.returncode == 0 and not ended.stderr


def test_another_broken_pipe_is_said(capfd):
    """A tracker's, for one: only that of stdout is none of the user's business."""

    @one_line_errors
    def main():
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    assert error_line(capfd, main) == "error: [Errno 32] Broken pipe"
