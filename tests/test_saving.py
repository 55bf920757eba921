"""Checkpoints are flushed and named while validation runs: what may come before that, and what failures cost."""

import errno
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier, Event, get_ident
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import libs.training.loss
from common.errors import InputError
from common.files import flush
from libs.checkpoints import checkpoint
from libs.checkpoints.checkpoint import EMA_FILE, HELD_OUT, MODEL_FILE, TrainerState
from libs.training import saving
from libs.training.config import parse_args, resume_policy
from libs.training.saving import Checkpoints
from libs.training.validation import Validation
from train_DiffuEraser_stage1 import Stage1

GOOD, LIMIT = (0, None), 10  # a Meter's bad_streak; seconds until a test that waits for nothing ends


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Those of a run at step 7 that has saved step 6 and keeps one, of one weight: save_state writes nothing."""
    accelerator = SimpleNamespace(
        scaler=None, num_processes=1, is_main_process=True, device="cpu", wait_for_everyone=lambda: None,
        save_state=lambda folder: None,
    )  # fmt: skip
    config = parse_args(Stage1, [f"--output_dir={tmp_path}", "--checkpoints_total_limit=1"])
    config.keep_best_checkpoint = True
    monkeypatch.setattr(saving, "sum_over_processes", lambda accelerator, value: value)
    last = tmp_path / "checkpoint-6"
    last.mkdir()
    weights = {MODEL_FILE: {"weight": torch.ones(3)}}
    return Checkpoints(config, Stage1, accelerator, TrainerState(1, global_step=7), last, lambda: weights)


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_checkpoint_is_named_when_it_is_on_the_disk(checkpoints, tmp_path, monkeypatch):
    """In a thread; until then the earlier one stays, and is the last one."""
    may_flush, named = Event(), []

    def flush_when_allowed(path):
        assert may_flush.wait(LIMIT), "the block does not run meanwhile"
        named.append((path.name, (tmp_path / "checkpoint-7").exists()))
        flush(path)

    monkeypatch.setattr(checkpoint, "flush", flush_when_allowed)
    checkpoints.save(GOOD, must=False)
    with checkpoints.finishing():
        assert names(tmp_path) == ["checkpoint-6", "checkpoint-7.partial"]
        assert checkpoints.last == tmp_path / "checkpoint-6"
        may_flush.set()
    files = ["model.safetensors", "trainer_state.json", "checkpoint-7.partial"]
    assert named == [*((name, False) for name in files), (tmp_path.name, True)]
    assert checkpoints.last == tmp_path / "checkpoint-7" and names(tmp_path) == ["checkpoint-7"]


@pytest.mark.parametrize("fails", [None, "weights", "state"])
def test_weights_are_written_beside_the_optimizer(checkpoints, tmp_path, monkeypatch, caplog, fails):
    """Where one of them fails, the other is waited for, and nothing stays."""
    both, weights_end = Barrier(2, timeout=LIMIT), []

    def save_weights(*args, **kwargs):
        both.wait()
        if fails == "weights":
            raise SafetensorError("No space left on device")
        both.wait()
        save_file(*args, **kwargs)
        weights_end.append(names(tmp_path))

    def save_state(folder):
        both.wait()
        if fails != "weights":
            both.wait()
        if fails == "state":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", save_weights)
    checkpoints.accelerator.save_state = save_state
    with caplog.at_level("INFO", "diffueraser"):
        checkpoints.save(GOOD, must=False)
    assert weights_end == ([] if fails == "weights" else [["checkpoint-6", "checkpoint-7.partial"]])
    if fails:
        assert "No space left on device): free some space" in caplog.text and names(tmp_path) == ["checkpoint-6"]
    else:
        checkpoints.finish()
        assert load_file(checkpoints.last / MODEL_FILE)["weight"].tolist() == [1, 1, 1]


def test_one_file_of_weights_at_a_time(checkpoints, monkeypatch):
    """safetensors copies all of a file's tensors to the machine's memory before it writes the first."""
    all_asked_for, threads = Event(), []

    def save_weights(*args, **kwargs):
        assert all_asked_for.wait(LIMIT)
        threads.append(get_ident())

    monkeypatch.setattr(checkpoint, "save_file", save_weights)
    checkpoints.accelerator.save_state = lambda folder: all_asked_for.set()
    checkpoints.weights = lambda: {name: {"weight": torch.ones(3)} for name in (MODEL_FILE, EMA_FILE)}
    checkpoints.save(GOOD, must=False)
    assert len(threads) == 2 and len(set(threads)) == 1


@pytest.mark.parametrize(("must", "processes"), [(False, 1), (True, 1), (False, 2)])
@pytest.mark.parametrize("where", ["flush", "rename"])
def test_a_disk_that_fails_the_flush(checkpoints, tmp_path, monkeypatch, caplog, must, processes, where):
    """It costs what a failing write does: nothing half-written stays, and the earlier checkpoint is the last one."""

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "flush":
        monkeypatch.setattr(checkpoint, "flush", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    checkpoints.accelerator.num_processes = processes
    ends, ran = must or processes > 1, []
    checkpoints.save(GOOD, must)
    words = r"checkpoint of step 7 could not be written \(.*No space left on device\): free some space"
    with (
        caplog.at_level("INFO", "diffueraser"),
        pytest.raises(InputError, match=words) if ends else nullcontext(),
        checkpoints.finishing(),
    ):
        ran.append(True)
    assert ran and ("could not be written" in caplog.text) != ends and "saved" not in caplog.text
    assert checkpoints.last == tmp_path / "checkpoint-6" and names(tmp_path) == ["checkpoint-6"]
    monkeypatch.undo()
    with checkpoints.finishing():  # nothing is left to do
        pass
    assert names(tmp_path) == ["checkpoint-6"]


@pytest.mark.parametrize("full", [False, True])
def test_an_error_meanwhile_waits_for_the_checkpoint(checkpoints, tmp_path, monkeypatch, caplog, full):
    """The block's error ends the run when the checkpoint has its name, or the log says why it has none."""
    may_flush = Event()

    def flush_at_last(path):
        assert may_flush.wait(LIMIT)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush", flush_at_last)
    checkpoints.save(GOOD, must=False)
    with caplog.at_level("INFO", "diffueraser"), pytest.raises(ZeroDivisionError), checkpoints.finishing():
        may_flush.set()
        raise ZeroDivisionError
    last = "checkpoint-6" if full else "checkpoint-7"
    assert checkpoints.last == tmp_path / last and names(tmp_path) == [last]
    assert ("could not be written" in caplog.text) == full


def test_what_a_killed_run_has_left(checkpoints, tmp_path):
    """The next checkpoint clears it away; one that had lost its name to a new one that never came gets it back."""
    for name in ("checkpoint-4.partial", "checkpoint-5.replaced", "checkpoint-6.replaced"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-6/new").touch()
    checkpoints.config.checkpoints_total_limit = None
    checkpoints.save(GOOD, must=False)
    checkpoints.finish()
    assert (
        names(tmp_path) == ["checkpoint-5", "checkpoint-6", "checkpoint-7"] and (tmp_path / "checkpoint-6/new").exists()
    )


@pytest.mark.parametrize("keep", [True, False])
def test_the_best_checkpoint_is_kept_where_asked_for(checkpoints, tmp_path, keep):
    checkpoint.mark_best(tmp_path, 6, 0.5, "these")
    checkpoints.config.keep_best_checkpoint = keep
    checkpoints.save(GOOD, must=False)
    checkpoints.finish()
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-7"][not keep :]


@pytest.mark.parametrize("main", [True, False])
def test_only_the_main_process_notes_the_best(checkpoints, tmp_path, main):
    checkpoints.accelerator.is_main_process = main
    checkpoints.state.settings = resume_policy().defaults
    checkpoints.last = tmp_path / "checkpoint-7"
    checkpoints.mark_best({HELD_OUT: 0.5})
    assert (checkpoint.read_best(tmp_path) is not None) == main


def test_a_later_incomplete_checkpoint_does_not_replace_the_new_one(checkpoints, tmp_path):
    """The run has passed it over: what it has just written is the newest that it can resume from."""
    (tmp_path / "checkpoint-9").mkdir()
    checkpoints.save(GOOD, must=False)
    checkpoints.finish()
    assert names(tmp_path) == ["checkpoint-7", "checkpoint-9"]


def test_files_of_validation_keep_their_rights(checkpoints, tmp_path, monkeypatch):
    """The process has one umask: to read it in the thread would open what others write meanwhile to everybody."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("umask has changed"))
    (tmp_path / "expected").touch()
    checkpoints.save(GOOD, must=False)
    Path(tmp_path, "checkpoint-7.partial/model.safetensors").chmod(0o600)  # as safetensors leaves it
    checkpoints.finish()
    saved = tmp_path / "checkpoint-7/model.safetensors"
    assert saved.stat().st_mode == (tmp_path / "expected").stat().st_mode


def test_other_processes_wait_for_the_name(checkpoints, tmp_path, monkeypatch):
    """They write, flush and delete nothing, and go on when the main process has."""
    waited = []
    (tmp_path / "checkpoint-7.partial").mkdir()  # the main process's
    checkpoints.accelerator.is_main_process = False
    checkpoints.accelerator.wait_for_everyone = lambda: waited.append(names(tmp_path))
    checkpoints.save(GOOD, must=False)
    assert not list((tmp_path / "checkpoint-7.partial").iterdir())
    waited.clear()
    checkpoints.finish()
    assert waited == [["checkpoint-6", "checkpoint-7.partial"]]


def test_validation_goes_on_while_a_checkpoint_is_flushed(train, tmp_path, monkeypatch):
    """Older ones are deleted, and the best one is noted, only when the new one has its name."""
    validating, run, seen = Event(), tmp_path / "run", []

    def flush_during_validation(path):
        assert validating.wait(LIMIT), "validation waits for the flush"

    def validate(self, *args, **kwargs):
        validating.set()
        return {HELD_OUT: 0.5}

    def note(name):
        return lambda *args, **kwargs: seen.append((name, (run / "checkpoint-1").is_dir()))

    monkeypatch.setattr(checkpoint, "flush", flush_during_validation)
    monkeypatch.setattr(Validation, "run", validate)
    for name in ("prune", "mark_best", "convert"):
        monkeypatch.setattr(saving, name, note(name))
    train(1, max_train_steps=1)
    assert seen == [("prune", True), ("mark_best", True), ("convert", True)]


def test_a_run_that_is_stopped_waits_for_its_checkpoint(train, tmp_path, capsys, monkeypatch):
    """It says that it can be resumed when it can; its error is the run's. One that is in its last step just ends."""
    loss = libs.training.loss.denoising_loss

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)

    monkeypatch.setattr(libs.training.loss, "denoising_loss", interrupted)
    train(1)
    output = capsys.readouterr().out
    assert 0 < output.find(f"saved {tmp_path}/run/checkpoint-1 in ") < output.find("stopped by SIGTERM at step 1")
    train(1, resume_from_checkpoint="latest")
    output = capsys.readouterr().out
    assert "done at step 2" in output and "stopped by" not in output
    monkeypatch.setattr(checkpoint, "flush", lambda path: os.open(tmp_path / "none", os.O_RDONLY))
    with pytest.raises(SystemExit):
        train(1, output_dir=tmp_path / "other")
    captured = capsys.readouterr()
    assert captured.err.startswith("error: checkpoint of step 1 could not be written")
    assert "stopped by" not in captured.out
    assert names(tmp_path / "other") == []


@pytest.mark.parametrize(("scaler", "saved"), [(None, False), (object(), True)])
def test_a_bad_loss_at_the_end(checkpoints, tmp_path, scaler, saved):
    """fp16's scaler has skipped that step, so the weights are whole; without one they are not, and are not kept. A
    damaged best_checkpoint.json costs nothing."""
    checkpoints.accelerator.scaler = scaler
    (tmp_path / "best_checkpoint.json").write_text("")
    with nullcontext() if saved else pytest.raises(InputError, match="the last 1 losses are not finite"):
        checkpoints.save((1, None), must=True)
    checkpoints.finish()
    assert checkpoints.last == tmp_path / ("checkpoint-7" if saved else "checkpoint-6")
