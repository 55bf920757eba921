"""Held-out loss, scores and pictures while training, and the report page made of them."""

import base64
import csv
import json
import os
import re
import signal
import sys
import types
import weakref
from functools import partial
from types import SimpleNamespace
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from clips import moving_video, write_frames
from conftest import equal_files, error_line
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_deployed import write_lora
from test_networks import clip_weights, lpips_weights

import libs.report.__main__
import libs.training.held_out_loss
import libs.training.validation
from common.errors import InputError
from common.run_files import AS_DEPLOYED, append_row, read_rows, validation_form, write_rows
from libs.checkpoints.checkpoint import PARTIAL_SUFFIX, mark_best, prune, read_best
from libs.checkpoints.rank import main as rank_checkpoints
from libs.evaluation.baselines import telea
from libs.evaluation.contact_sheet import contact_sheet, show_in_tracker
from libs.inference.composition import resize_picture
from libs.inference.pipeline import Pipeline
from libs.inference.video import write_gif
from libs.inpainter import FrameInpainter
from libs.report.__main__ import write_report
from libs.report.charts import ticks
from libs.training import saving
from libs.training.config import resume_policy, what_sets_clips
from libs.unet_2d_condition import UNet2DConditionModel


@pytest.fixture
def validated(train, videos, monkeypatch):
    """train() with validation on two videos after every step, sampled in two steps."""
    monkeypatch.setattr(FrameInpainter, "inference_steps", 2)
    davis, names = videos / "DAVIS", ("buoy", "lantern")

    def run(stage=1, **overrides):
        settings = {
            "validation_steps": 1,
            "probe_clips": 3,
            "validation_image": [str(davis / "JPEGImages/480p" / name) for name in names],
            "validation_mask": [str(davis / "Annotations/480p" / name) for name in names],
        }
        train(stage, **{**settings, **overrides})

    return run


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_held_out_loss_scores_and_pictures(validated, tmp_path, capsys):
    """The same weights at another step have the same held-out loss, to the last bit; everything is where it belongs."""
    validated(learning_rate=1e-30, adam_weight_decay=0, report_to="tensorboard")
    folder = tmp_path / "run" / "logs-finetune-stage1"
    output = capsys.readouterr().out
    losses = read(folder / "held_out.csv")
    assert [row["step"] for row in losses] == ["0", "1", "2"]
    assert len({row["held_out_loss"] for row in losses}) == 1
    assert "on 3 fixed clips of 2 video(s)" in output and "1.000 of its start" in output

    rows = read(folder / "scores.csv")
    assert [(row["step"], row["video"]) for row in rows] == [(s, v) for s in "12" for v in ("buoy", "lantern")]
    assert {**rows[0], "step": ""} == {**rows[2], "step": ""}
    assert rows[0]["frames"] == "3" and 0 < float(rows[0]["psnr_hole"]) < float(rows[0]["psnr"])
    assert "PSNR hole" in output and "OpenCV Telea" in output and "the video itself" in output

    # Those of the hyperparameters lie in a folder below.
    log = min(folder.rglob("events.out.tfevents.*"), key=lambda path: len(path.parts))
    events = EventAccumulator(str(log.parent), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples/1-buoy", "samples/2-lantern", "samples/contact_sheet"}
    assert events.Images("samples/1-buoy")[0].encoded_image_string.startswith(b"GIF8")
    assert "held_out_loss" in events.Tags()["scalars"] and "validation/psnr_hole" in events.Tags()["scalars"]
    with Image.open(folder / "samples/sample-2/contact_sheet.png") as sheet:
        assert sheet.width > 250 and sheet.height > 500


def test_a_failed_validation_costs_nothing_else(validated, train, tmp_path, capsys, monkeypatch):
    """Out of memory while sampling, then, the machine's, while measuring: a line each, and the weights of a run without
    validation."""
    train(1, output_dir=tmp_path / "plain")
    capsys.readouterr()

    def fail(*args, error=RuntimeError, **kwargs):
        raise error("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(Pipeline, "fill", fail)
    validated()
    output = capsys.readouterr().out
    assert output.count("validation at step 1 failed, training goes on: CUDA out of memory.") == 2
    assert "0 videos in" in output and "without buoy, lantern" in output and "of its start" in output
    monkeypatch.setattr(libs.training.held_out_loss, "predict", partial(fail, error=MemoryError))
    validated(output_dir=tmp_path / "again")
    assert "of its start" not in capsys.readouterr().out
    for name in ("run", "again"):
        final = "unet_main/diffusion_pytorch_model.safetensors"
        assert equal_files(tmp_path / "plain" / final, tmp_path / name / final)


def test_a_tracker_that_takes_no_pictures_costs_no_best_checkpoint(validated, tmp_path, capsys, monkeypatch):
    """Its library's own class of errors, after the scores are known."""
    fail = mock.Mock(side_effect=Exception("connection lost"))
    monkeypatch.setattr(libs.training.validation, "show_in_tracker", fail)
    validated(max_train_steps=1, best_by="psnr_hole", report_to="tensorboard")
    assert "tensorboard gets no more values in this start, training goes on: connection lost" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/best_checkpoint.json").read_text())["step"] == 1


def test_memory_is_given_back_after_what_did_not_fit(monkeypatch):
    """What the failed function held is gone by then: its frames live as long as the error's traceback."""
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(held() is None))

    def fail():
        nonlocal held
        tensor = torch.zeros(1)
        held = weakref.ref(tensor)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    held = None
    assert libs.training.held_out_loss.attempt(1, torch.device("cuda"), fail) is None
    assert given_back == [True]


def test_what_is_sampled(train, videos, monkeypatch, tmp_path):
    """Objects are dilated four times; 50 and 20 steps of UniPC, from one noise for all frames in stage 1 and from their
    own in stage 2; GIFs of 8 frames per second."""
    davis, calls = videos / "DAVIS", []

    def fill(self, frames, holes, prompt_embeds, seed):
        calls.append((self.num_inference_steps, type(self.sampler).__name__, self.shared_noise, holes))
        return frames

    monkeypatch.setattr(Pipeline, "fill", fill)
    images, masks = (davis / kind / "480p/buoy" for kind in ("JPEGImages", "Annotations"))
    for stage, steps in ((1, 50), (2, 20)):
        calls.clear()
        train(
            stage, max_train_steps=1, validation_steps=1, probe_clips=0, resolution=96,
            validation_image=[str(images)], validation_mask=[str(masks)], output_dir=tmp_path / str(stage),
        )  # fmt: skip
        assert {call[:3] for call in calls} == {(steps, "UniPCMultistepScheduler", stage == 1)} and len(calls) == 2
        first = np.asarray(Image.open(sorted(masks.iterdir())[0])).astype(np.uint8)
        cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
        assert np.array_equal(calls[0][3][0] > 0, cv2.dilate(first, cross, iterations=4) > 0)
        gif = Image.open(tmp_path / f"{stage}/logs-finetune-stage{stage}/samples/sample-1/1.gif")
        assert gif.n_frames == 3 and gif.info["duration"] == pytest.approx(1000 / 8, abs=5)


def test_two_processes_may_write_the_same_gif(tmp_path, monkeypatch):
    """Where there are more processes than videos, several sample the same one."""
    frames, save = np.zeros((2, 8, 8, 3), np.uint8), Image.Image.save

    def save_while_another_does(*args, **settings):
        save(*args, **settings)
        monkeypatch.setattr(Image.Image, "save", save)
        write_gif(tmp_path / "1.gif", frames)

    monkeypatch.setattr(Image.Image, "save", save_while_another_does)
    write_gif(tmp_path / "1.gif", frames)
    assert [path.name for path in tmp_path.iterdir()] == ["1.gif"]


def test_a_signal_while_validating(validated, tmp_path, capsys, monkeypatch):
    """That step's checkpoint is written; the video is finished, no other begun, and the next step is the last."""
    fill, checkpoints = Pipeline.fill, []

    def interrupted(*args, **settings):
        # It gets its final name while videos are filled.
        checkpoints.append([path.name.removesuffix(PARTIAL_SUFFIX) for path in tmp_path.glob("run/checkpoint-*")])
        if len(checkpoints) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return fill(*args, **settings)

    monkeypatch.setattr(Pipeline, "fill", interrupted)
    validated(max_train_steps=4, checkpointing_steps=1)
    output = capsys.readouterr().out
    assert checkpoints == [["checkpoint-1"]] * 2  # a video has two holes
    assert "without lantern" in output and "stopped by SIGTERM at step 2" in output


def test_time_limit(validated, tmp_path, capsys):
    validated(max_train_steps=1, validation_minutes=1e-9)
    output = capsys.readouterr().out
    assert "without buoy, lantern" in output and "of its start" in output


def test_videos_shorter_than_a_clip_have_no_held_out_loss(validated, videos, tmp_path, capsys):
    validated(max_train_steps=1, nframes=27, davis_root="", ytvos_root=long_videos(tmp_path))
    output = capsys.readouterr().out
    assert "held-out loss 0" not in output and "2 shorter than 27 frames: sampled, but not in" in output


def long_videos(folder):
    frames, _ = moving_video(27, 32, 40)
    write_frames(folder / "YTBV/JPEGImages/long", frames)
    return folder / "YTBV"


def test_best_checkpoint(tmp_path):
    """The lowest held-out loss so far is noted; a run resumed from an earlier step forgets what came after, and losses
    on other clips do not compare."""

    def mark(step, loss, clips="these"):
        return mark_best(tmp_path, step, loss, clips)

    assert mark(10, 0.5) and not mark(20, 0.5) and mark(30, 0.4)
    note = {"checkpoint": "checkpoint-30", "step": 30, "held_out_loss": 0.4, "clips": "these"}
    assert read_best(tmp_path) == note
    assert mark(40, 0.7, "others") and mark(10, 0.3) and not mark(5, float("inf"))
    assert mark(20, 0.2) and mark(20, 0.25) and not mark(25, float("nan"))
    for step in (10, 20, 30, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune(tmp_path, 40, 1, keep_best=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-40"]
    prune(tmp_path, 40, 1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-40"]


def test_best_checkpoint_by_a_score(tmp_path):
    """More dB is better; what was noted by another measure does not count."""

    def mark(step, value):
        return mark_best(tmp_path, step, value, "these", measure="psnr_hole", higher_is_better=True)

    assert mark_best(tmp_path, 10, 0.5, "these") and mark(20, 25.0) and not mark(30, 24.0) and mark(40, 26.0)
    assert read_best(tmp_path) == {"checkpoint": "checkpoint-40", "step": 40, "psnr_hole": 26.0, "clips": "these"}


def test_scores_of_another_form_choose_no_checkpoint(tmp_path, monkeypatch, caplog):
    """As deployed not all videos were scored: what they have as trained is another measure."""
    noted = []
    monkeypatch.setattr(saving, "mark_best", lambda folder, step, value, *others: noted.append(value))
    config = SimpleNamespace(output_dir=tmp_path, best_by="psnr_hole", pcm_weights="pcm.safetensors")
    state, last = SimpleNamespace(global_step=20, settings={}), tmp_path / "checkpoint-20"
    monkeypatch.setattr(saving, "what_sets_clips", lambda settings: {})
    checkpoints = saving.Checkpoints(config, None, SimpleNamespace(is_main_process=True), state, last, None)
    checkpoints.mark_best({"held_out_loss": 0.1, "psnr_hole": 11.0})
    assert noted == []
    scores = {"psnr_hole": 11.0, "psnr_hole-as-deployed": 30.0}
    checkpoints.mark_best({"held_out_loss": 0.1, **scores, "setups": ["a"], "setups-as-deployed": ["b"]})
    assert noted == [30.0]
    assert mark_best(tmp_path, 50, 0.7, "these")


def test_a_best_checkpoint_that_was_noted_before_a_setting_was_there(tmp_path):
    """It was measured on the same clips where the setting is at its default."""
    settings = json.loads(json.dumps(resume_policy().defaults))  # as a checkpoint has them
    today = what_sets_clips(settings)
    assert mark_best(tmp_path, 10, 0.5, {name: today[name] for name in today.keys() - {"mask_mix", "paste"}})
    assert not mark_best(tmp_path, 20, 0.6, today, what_sets_clips)
    assert mark_best(tmp_path, 30, 0.7, what_sets_clips({**settings, "paste": 0.3}), what_sets_clips)


def test_a_best_checkpoint_of_other_annotated_videos(tmp_path):
    """It does not count where clips borrow their objects; one whose videos an older version did not note does."""
    config = SimpleNamespace(output_dir=tmp_path, best_by="held_out_loss", pcm_weights=None)
    settings = {**json.loads(json.dumps(resume_policy().defaults)), "mask_mix": "object=1", "hole_videos": "bear"}
    settings["proportion_empty_prompts"] = 0.5
    state = SimpleNamespace(settings=settings)

    def mark(step, value):
        state.global_step = step
        main_process, last = SimpleNamespace(is_main_process=True), tmp_path / f"checkpoint-{step}"
        saving.Checkpoints(config, None, main_process, state, last, None).mark_best({"held_out_loss": value})
        return read_best(tmp_path)["step"]

    older = what_sets_clips(settings)
    del older["hole_videos"], older["proportion_empty_prompts"]
    mark_best(tmp_path, 10, 0.5, older)
    assert mark(20, 0.6) == 10 and mark(30, 0.4) == 30 and mark(40, 0.5) == 30
    settings["hole_videos"] = "hike"
    assert mark(50, 0.5) == 50


def test_other_validation_videos_start_the_held_out_loss_anew(validated, videos, tmp_path, capsys):
    validated(max_train_steps=1, learning_rate=1e-30)
    best = json.loads((tmp_path / "run/best_checkpoint.json").read_text())
    capsys.readouterr()
    davis = videos / "DAVIS"
    validated(
        max_train_steps=2,
        resume_from_checkpoint="latest",
        learning_rate=1e-30,
        validation_image=[str(davis / "JPEGImages/480p/lantern")],
        validation_mask=[str(davis / "Annotations/480p/lantern")],
    )
    output = capsys.readouterr().out
    assert "validation_image from ['buoy', 'lantern'] to ['lantern']" in output
    assert "the held-out loss is measured on other clips from here on, and starts anew" in output
    assert "1.000 of its start" in output and "checkpoint-2 is the best checkpoint so far" in output
    assert json.loads((tmp_path / "run/best_checkpoint.json").read_text())["clips"] != best["clips"]
    folder = tmp_path / "run/logs-finetune-stage1"
    assert {row["step"] for row in read(folder / "held_out-until-1.csv")} == {"0", "1"}
    start, *_ = (float(row["held_out_loss"]) for row in read(folder / "held_out.csv"))
    assert f"at the run's start {start:.4f}" in (tmp_path / "run/README.md").read_text()


def test_held_out_losses_are_kept_when_a_run_starts_anew_twice(tmp_path):
    """It was killed before its next checkpoint, and goes on from the same step."""
    for content in ("first", "second", "third"):
        (tmp_path / "held_out.csv").write_text(content)
        libs.training.held_out_loss.set_aside(tmp_path / "held_out.csv", 8)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    names = ("held_out-until-8.csv", "held_out-until-8-2.csv", "held_out-until-8-3.csv")
    assert kept == dict(zip(names, ("first", "second", "third"), strict=True))


def test_the_run_notes_its_best_checkpoint(validated, tmp_path, capsys):
    validated(max_train_steps=2, checkpointing_steps=1, validation_steps=100, validation_minutes=1e-9)
    losses = {
        row["step"]: float(row["held_out_loss"]) for row in read(tmp_path / "run/logs-finetune-stage1/held_out.csv")
    }
    best = json.loads((tmp_path / "run/best_checkpoint.json").read_text())
    assert best["held_out_loss"] == min(losses["1"], losses["2"]) == losses[str(best["step"])]
    assert f"checkpoint-{best['step']} is the best checkpoint so far" in capsys.readouterr().out


def test_rows_of_a_resumed_run(tmp_path):
    for step in (10, 20, 30, 20):
        append_row(tmp_path / "x.csv", {"step": step, "loss": step / 10})
    append_row(tmp_path / "x.csv", {"step": 30, "loss": 7})
    assert [row["loss"] for row in read_rows(tmp_path / "x.csv")] == ["1.0", "2.0", "7"]
    assert read_rows(tmp_path / "none.csv") == []


@pytest.mark.parametrize("kept", [0, 3, 15, 20, 24], ids=["all_torn", "header", "step_only", "columns", "no_newline"])
def test_a_torn_row_is_dropped(tmp_path, kept):
    """A file cut anywhere has its whole rows and those that come later."""
    path = tmp_path / "x.csv"
    for step in (10, 20):
        append_row(path, {"step": step, "loss": 0.125})
    whole = path.read_bytes()
    assert whole == b"step,loss\r\n10,0.125\r\n20,0.125\r\n"
    path.write_bytes(whole[:kept])
    before = read_rows(path)
    append_row(path, {"step": 30, "loss": 0.25})
    assert read_rows(path) == [*before, {"step": "30", "loss": "0.25"}]
    assert before == [{"step": "10", "loss": "0.125"}][: kept >= 21]


def test_rows_are_written_all_or_none(tmp_path):
    """The same bytes as row by row; what cannot be written leaves the file that is there."""
    rows = [{"video": "caf\udce9", "psnr": 0.1}, {"video": 'a, "b"\n', "psnr": None}, {"video": "c", "tc": np.nan}]
    for row in rows:
        append_row(tmp_path / "x.csv", row)
    write_rows(tmp_path / "new/y.csv", rows)
    assert (tmp_path / "new/y.csv").read_bytes() == (tmp_path / "x.csv").read_bytes()
    with pytest.raises(UnicodeError):
        write_rows(tmp_path / "new/y.csv", [{"video": "\ud800"}, *rows])
    assert (tmp_path / "new/y.csv").read_bytes() == (tmp_path / "x.csv").read_bytes()
    write_rows(tmp_path / "new/y.csv", [])
    assert not any((tmp_path / "new").iterdir())


def test_rows_that_are_not_whole(tmp_path):
    """As older versions left them in the middle of a file."""
    (tmp_path / "x.csv").write_text("step,loss\n10,1.0\n20\n30,0.4,40,0.3\n50,0.2\n")
    assert [row["step"] for row in read_rows(tmp_path / "x.csv")] == ["10", "50"]


def test_contact_sheet():
    """Five rows of labelled tiles; the difference is black where the result is the input."""
    frames, holes = moving_video(9, 40, 60)
    sheet = contact_sheet("title", frames, holes, frames)
    assert sheet.dtype == np.uint8
    rows = [sheet[40 + row * 44 + 5 : 40 + row * 44 + 35, 120:160] for row in range(5)]
    assert set(np.unique(rows[1])) <= {0, 255} and rows[4].max() == 0
    assert np.array_equal(rows[0], rows[3]) and rows[0].any()
    assert (sheet[:40, 108:].min(axis=2) < 100).any()  # the title is written


def test_samples_in_wandb(monkeypatch, tmp_path):
    """Each GIF as a video, and the sheet as an image, at the step."""
    wandb = types.ModuleType("wandb")
    wandb.Video = lambda path, format: ("video", path, format)
    wandb.Image = lambda path: ("image", path)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logged = []
    tracker = types.SimpleNamespace(name="wandb", log=lambda values, step: logged.append((step, values)))
    show_in_tracker(tracker, 7, {"bear": tmp_path / "1.gif"}, tmp_path / "sheet.png")
    assert logged == [(7, {"samples/bear": ("video", str(tmp_path / "1.gif"), "gif"),
                           "samples/contact_sheet": ("image", str(tmp_path / "sheet.png"))})]  # fmt: skip


def test_report_page(validated, tmp_path, capsys):
    """One file without a link to another: curves, samples, checkpoints, settings."""
    validated(max_train_steps=2, checkpointing_steps=1)
    capsys.readouterr()
    libs.report.__main__.main([str(tmp_path / "run")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run/report.html")
    page = (tmp_path / "run/report.html").read_text()
    assert not re.search(r"\bnan\b", re.sub('base64,[^"]*', "", page))
    assert page.count("<svg") == 8 and page.count("data:image/webp") == 4 and page.count("data:image/png") == 1
    assert "checkpoint-2" in page and "best" in page and "learning_rate" in page and "of its start" in page
    assert "http" not in page
    with pytest.raises(InputError, match=r"has no config\.json"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(InputError, match=r"has no config\.json of a training run"):
        write_report(tmp_path)
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\): choose another place with --output"):
        write_report(tmp_path / "run", tmp_path / "config.json" / "report.html")

    samples = tmp_path / "run/logs-finetune-stage1/samples"
    gif = samples / "sample-2/1.gif"
    gif.write_bytes(gif.read_bytes()[:-500])  # a killed run of an older version; a sheet is being written
    (samples / "sample-1/1.gif").write_bytes(b"")
    (samples / "sample-2/contact_sheet.png").write_bytes(b"")
    page = write_report(tmp_path / "run").read_text()
    assert page.count("data:image/webp") == 2 and page.count('<td class="muted">none</td>') == 2
    (sheet,) = re.findall('data:image/png;base64,([^"]*)', page)
    assert base64.b64decode(sheet) == (samples / "sample-1/contact_sheet.png").read_bytes()
    (samples / "sample-1/contact_sheet.png").unlink()
    assert "data:image/png" not in write_report(tmp_path / "run").read_text()

    (tmp_path / "else").mkdir()
    assert write_report(tmp_path / "run", tmp_path / "else") == tmp_path / "else/report.html"
    for content in ("[1]", '{"checkpoint": "checkpoint-1"}'):
        (tmp_path / "run/best_checkpoint.json").write_text(content)
        with pytest.raises(InputError, match="holds files that are not a training run's any more"):
            write_report(tmp_path / "run")


def test_a_gif_is_whole_or_not_there(tmp_path, monkeypatch):
    """Whoever looks while it is written finds the old one."""
    write_gif(tmp_path / "1.gif", moving_video(3, 20, 30)[0])
    before, save = (tmp_path / "1.gif").read_bytes(), Image.Image.save

    def look(*args, **kwargs):
        save(*args, **kwargs)
        assert (tmp_path / "1.gif").read_bytes() == before

    monkeypatch.setattr(Image.Image, "save", look)
    write_gif(tmp_path / "1.gif", moving_video(5, 20, 30)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["1.gif"]
    with Image.open(tmp_path / "1.gif") as gif:
        assert gif.n_frames == 5 and gif.info["loop"] == 0


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0, 40), (11.44, 11.69), (0, 1e-5), (0, 123456), (0.5, 0.5), (0, 0), (0, 1e-13), (0.5, 0.5 + 1e-13)],
)
def test_ticks_enclose_the_values(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8 and found == sorted(set(found))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True, "use_8bit_adam": True}],
    ids=["plain", "accumulating", "low_memory"],
)
def test_a_cuda_graph_changes_nothing(validated, tmp_path, changes):
    """The same weights, bit for bit, with checkpoints and validations in between, for which graphs are given up."""
    settings = {"max_train_steps": 13, "checkpointing_steps": 5, "validation_steps": 9, "mixed_precision": "fp16"}
    settings |= changes
    validated(output_dir=tmp_path / "plain", **settings)
    validated(output_dir=tmp_path / "graph", cuda_graph=True, latent_cache=tmp_path / "latents", **settings)
    final = "unet_main/diffusion_pytorch_model.safetensors"
    assert equal_files(tmp_path / "plain" / final, tmp_path / "graph" / final)


@pytest.mark.parametrize("stage", [1, 2])
def test_validation_as_deployed(validated, train, weights, tmp_path, capsys, stage):
    """Two steps of few-step weights from a prior, beside the other form if asked: rows, files and log say which, and
    the weights are, bit for bit, those of a run that validates without."""
    pcm_weights = tmp_path / "pcm_sd15_2step.safetensors"
    write_lora(pcm_weights, UNet2DConditionModel.from_pretrained(weights / "stable-diffusion-v1-5/unet"))
    train(stage, output_dir=tmp_path / "plain")
    capsys.readouterr()
    validated(stage, pcm_weights=pcm_weights)
    output = capsys.readouterr().out
    assert "few-step weights: 2 steps" in output and "step 2, as deployed" in output
    assert "validation as deployed: 2 videos" in output and "validation: 2 videos in" not in output
    folder = tmp_path / f"run/logs-finetune-stage{stage}"
    assert sorted(path.name for path in (folder / "samples/sample-2").iterdir()) == [
        "1-as-deployed.gif", "2-as-deployed.gif", "contact_sheet-as-deployed.png",
    ]  # fmt: skip
    assert len(read(folder / "scores-as-deployed.csv")) == 4 and not (folder / "scores.csv").exists()
    final = "unet_main/diffusion_pytorch_model.safetensors"
    assert equal_files(tmp_path / "plain" / final, tmp_path / "run" / final)
    page = write_report(tmp_path / "run").read_text()
    assert page.count("data:image/webp") == 4 and page.count("data:image/png") == 1
    assert "filled as deployed" in (tmp_path / "run/README.md").read_text()
    if stage == 1:  # the other stage's 20 steps take a while
        validated(pcm_weights=pcm_weights, validate_as_trained=True, max_train_steps=1, output_dir=tmp_path / "both")
        output = capsys.readouterr().out
        assert "validation as deployed: 2 videos" in output and "validation: 2 videos in" in output
        names = {path.name for path in (tmp_path / "both/logs-finetune-stage1/samples/sample-1").iterdir()}
        assert {"1.gif", "1-as-deployed.gif", "contact_sheet.png"} < names


def test_the_form_to_show_follows_from_the_newest_start():
    """PCM_WEIGHTS may come and go between starts: files of the other form are of earlier steps."""
    assert validation_form({"pcm_weights": None}) == validation_form({}) == ""
    assert validation_form({"pcm_weights": "x"}) == AS_DEPLOYED
    both = {"pcm_weights": "x", "validate_as_trained": True}
    assert validation_form(both) == "" and validation_form(both, deployed_first=True) == AS_DEPLOYED


def test_priors_of_validation_videos(validated, weights, videos, tmp_path, capsys, monkeypatch):
    """A folder of frames per video, for its object: in the synthetic hole, which is scored, they would show the truth.
    What is not there is said before weights load."""
    pcm_weights = tmp_path / "pcm_sd15_2step.safetensors"
    write_lora(pcm_weights, UNet2DConditionModel.from_pretrained(weights / "stable-diffusion-v1-5/unet"))
    settings = {"pcm_weights": pcm_weights, "prior": tmp_path / "priors", "max_train_steps": 1}
    assert "priors/buoy holds 0 frames" in error_line(capsys, validated, **settings)
    own = {**settings, "prior": videos / "DAVIS/JPEGImages/480p"}
    assert "480p holds the videos themselves: what another" in error_line(capsys, validated, **own)
    write_frames(tmp_path / "priors/buoy", moving_video(3, 90, 160)[0])
    assert "priors/buoy is 160x90, " in error_line(capsys, validated, **settings)
    given, _ = moving_video(3, 96, 160)
    for name in ("buoy", "lantern"):
        write_frames(tmp_path / "priors" / name, given)
    filled, fill = [], Pipeline.fill

    def watch(self, frames, holes, prompt_embeds, seed, prior):
        filled.append((frames, holes, np.stack(list(prior))))
        return fill(self, frames, holes, prompt_embeds, seed, prior)

    monkeypatch.setattr(Pipeline, "fill", watch)
    validated(**settings)
    for k, (frames, holes, prior) in enumerate(filled):
        expected = telea(frames, holes) if k % 2 else np.stack([resize_picture(x, *holes.shape[1:]) for x in given])
        assert np.array_equal(prior, expected)
    assert len(filled) == 4
    assert "prior " + str(tmp_path / "priors") in capsys.readouterr().out
    assert (tmp_path / "run/logs-finetune-stage1/samples/sample-1/2-as-deployed.gif").is_file()


def test_the_best_checkpoint_by_lpips(validated, tmp_path, capsys):
    """Every checkpoint is scored then, LPIPS and TC among the scores in table, CSV and page; and ranked."""
    weights = {"lpips_weights": lpips_weights(tmp_path / "lpips"), "clip_weights": clip_weights(tmp_path / "clip")}
    validated(
        max_train_steps=3, checkpointing_steps=2, validation_steps=100, best_by="lpips_hole", resolution=64, **weights,
    )  # fmt: skip
    output, run = capsys.readouterr().out, tmp_path / "run"
    rows = read(run / "logs-finetune-stage1/scores.csv")
    means = {step: np.mean([float(row["lpips_hole"]) for row in rows if row["step"] == step]) for step in "123"}
    best = read_best(run)
    assert best["lpips_hole"] == pytest.approx(min(means["2"], means["3"])) == pytest.approx(means[str(best["step"])])
    assert f"checkpoint-{best['step']} is the best checkpoint so far, by LPIPS hole" in output
    tables = [lines for lines in output.split("PSNR hole")[1:] if "LPIPS hole" in lines.splitlines()[0]]
    assert len(tables) == 3 and all(float(row["lpips"]) < float(row["lpips_hole"]) for row in rows)
    assert all(0 < float(row["tc"]) < 1 for row in rows) and "LPIPS hole           TC" in output
    assert "LPIPS hole" in write_report(run).read_text() and "by LPIPS hole" in write_report(run).read_text()

    rank_checkpoints([str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "by LPIPS hole, mean of 2 video(s); differences from the best"
    assert lines[1].split() == [f"checkpoint-{best['step']}", f"{best['lpips_hole']:.4f}", "the", "best"]
    assert " of 2 videos, seeds: 1" in lines[2] and len(lines) == 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"best_by": "psnr_hole", "validation_steps": 0}, "--best_by=psnr_hole needs validation videos to score"),
     ({"best_by": "lpips_hole"}, "--best_by=lpips_hole needs --lpips_weights"),
     ({"keep_best_checkpoint": True, "validation_steps": 0}, "--keep_best_checkpoint needs the held-out loss"),
     ({"keep_best_checkpoint": True, "probe_clips": 0}, "--keep_best_checkpoint needs the held-out loss"),
     ({"lpips_weights": "nowhere"}, "nowhere: --lpips_weights needs a folder with two published files"),
     ({"clip_weights": "nowhere"}, "nowhere is no folder: --clip_weights needs a CLIP model's folder")]
)  # fmt: skip
def test_scores_that_cannot_be_had(validated, capsys, settings, expected):
    """In a line, before any weights load."""
    assert expected in error_line(capsys, validated, **settings)
