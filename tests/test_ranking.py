"""Checkpoints beside each other by what a run measured: only values of the same holes and procedure are compared."""

import json

from conftest import error_line
from test_deployed import write_lora
from test_validation import read, validated  # noqa: F401

from common.run_files import append_row, read_rows
from libs.checkpoints.checkpoint import read_best
from libs.checkpoints.rank import main as rank_checkpoints
from libs.inference.pipeline import Pipeline
from libs.report.gather import gather
from libs.unet_2d_condition import UNet2DConditionModel

LEFT = "not scored on all of these videos with these holes and settings: "


def test_ranking(tmp_path, capsys):
    """The mean over videos decides; intervals are those of the pairs; what was scored on other videos is named."""
    (tmp_path / "config.json").write_text(json.dumps([{"command": [], "settings": {"logging_dir": "logs"}}]))
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    values = {1: [20, 30, 25, 22], 2: [21, 31, 26.2, 23], 3: [21.1, 30.9, 26.2, 23], 4: [21]}
    for step, scores in values.items():
        for i, value in enumerate(scores):
            row = {"step": step, "number": i, "video": f"v{i}", "held_out_loss": 0.1 * step + i, "psnr_hole": value}
            append_row(tmp_path / "logs/scores.csv", row)
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-0")  # never scored
    rank_checkpoints([str(tmp_path), "--by=psnr_hole"])
    _, *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[f"checkpoint-{step}", value] for step, value in
                                                    ((2, "25.30"), (3, "25.30"), (1, "24.25"))]  # fmt: skip
    assert "no difference that 4 videos can show: +0.00 dB" in lines[1] and "worse: -1.05 dB [-1.21, -0.89]" in lines[2]
    assert "better in 0 of 4" in lines[2] and last == f"{LEFT}checkpoint-0"
    rank_checkpoints([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1].startswith("checkpoint-1  1.6000  the best")
    append_row(tmp_path / "logs/held_out.csv", {"step": 1, "held_out_loss": 5})
    append_row(tmp_path / "logs/held_out-until-1.csv", {"step": 0, "held_out_loss": 1})  # other clips
    rank_checkpoints([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1].startswith("checkpoint-2  1.7000  the best")
    assert "has no LPIPS of a checkpoint's step" in error_line(capsys, rank_checkpoints, [str(tmp_path), "--by=lpips"])
    (tmp_path / "logs/scores.csv").write_text("step;number;video;psnr_hole\n1;0;v0;20\n")  # a spreadsheet's
    assert "not as the run wrote them (KeyError('step'))" in error_line(capsys, rank_checkpoints, [str(tmp_path)])
    assert "no config.json of a training run" in error_line(capsys, rank_checkpoints, [str(tmp_path / "logs")])


def test_the_newest_start_says_what_is_ranked(tmp_path, capsys):
    """By its --best_by, from its folder of logs, and as deployed where few-step weights are what is validated."""
    settings = {"logging_dir": "logs", "best_by": "psnr_hole", "pcm_weights": "pcm.safetensors",
                "validate_as_trained": True}  # fmt: skip
    starts = [{"logging_dir": "old", "best_by": "held_out_loss"}, settings]
    (tmp_path / "config.json").write_text(json.dumps([{"command": [], "settings": start} for start in starts]))
    for step, trained, deployed, loss in ((1, 30, 20, 0.1), (2, 25, 22, 0.3), (3, 20, 21, 0.2)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        setup = "a" if step > 1 else "another"  # of scores: the held-out loss has nothing to do with it
        video = {"step": step, "number": 1, "video": "v", "setup": setup, "held_out_loss": loss}
        append_row(tmp_path / "logs/scores.csv", {**video, "psnr_hole": trained})
        append_row(tmp_path / "logs/scores-as-deployed.csv", {**video, "psnr_hole": deployed})

    def best(*flags):
        rank_checkpoints([str(tmp_path), *flags])
        title, first, *_ = capsys.readouterr().out.splitlines()
        return first.split()[0], "as deployed" in title

    assert best() == ("checkpoint-2", True) and best("--by=held_out_loss") == ("checkpoint-1", False)


def test_only_finite_values_of_all_videos_are_ranked(tmp_path, capsys):
    """A frame that is filled to the bit has no finite PSNR; a mean with it, or over fewer videos, is none."""
    (tmp_path / "config.json").write_text(json.dumps([{"command": [], "settings": {"logging_dir": "logs"}}]))
    values = {1: [40], 2: [20, "inf"], 3: [22, 23], 4: [24, 25], 5: [23, 24]}
    for step, scores in values.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        for i, value in enumerate(scores):
            append_row(tmp_path / "logs/scores.csv", {"step": step, "number": i, "video": "same", "psnr_hole": value})
    rank_checkpoints([str(tmp_path), "--by=psnr_hole"])
    _, *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint-4", "checkpoint-5", "checkpoint-3"]
    assert last == f"{LEFT}checkpoint-1, checkpoint-2"


def test_scores_of_other_holes_are_not_ranked(validated, tmp_path, capsys):  # noqa: F811
    """A run that went on with another --mask_span: its earlier scores are named, and in no mean."""
    run = tmp_path / "run"
    settings = {"checkpointing_steps": 1, "validation_minutes": 10}
    validated(max_train_steps=2, **settings)
    validated(max_train_steps=4, resume_from_checkpoint="latest", mask_span="0.1,0.2", **settings)
    capsys.readouterr()
    rank_checkpoints([str(run), "--by=psnr_hole"])
    _, *lines, last = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"checkpoint-3", "checkpoint-4"}
    assert last == f"{LEFT}checkpoint-1, checkpoint-2"
    assert [step for step, _ in gather(run)["scores"]] == [3, 4]


def test_a_step_that_was_validated_twice(tmp_path):
    """Such as the first one of a run that was killed and begun again, with other holes: the newer scores count."""
    for step, number, setup in ((1, 1, "a"), (1, 2, "a"), (1, 1, "b"), (1, 2, "b"), (2, 1, "b")):
        append_row(tmp_path / "x.csv", {"step": step, "number": number, "setup": setup})
    rows = [tuple(row.values()) for row in read_rows(tmp_path / "x.csv")]
    assert rows == [("1", "1", "b"), ("1", "2", "b"), ("2", "1", "b")]


def test_the_best_checkpoint_starts_anew_with_another_procedure(validated, weights, tmp_path, capsys):  # noqa: F811
    """By a score: from another prior, or with other few-step weights; not from where the same ones lie."""
    files = [tmp_path / folder / "pcm_sd15_2step.safetensors" for folder in ("a", "b")]
    files.append(tmp_path / "pcm_sd15_4step.safetensors")
    for file in files:
        file.parent.mkdir(exist_ok=True)
        write_lora(file, UNet2DConditionModel.from_pretrained(weights / "stable-diffusion-v1-5/unet"))
    settings = {"checkpointing_steps": 1, "best_by": "psnr_hole", "resume_from_checkpoint": "latest"}
    noted = []
    for step, (file, prior) in enumerate(
        [(files[0], "telea"), (files[1], "telea"), (files[1], "median"), (files[2], "median")], start=1
    ):
        validated(max_train_steps=step, pcm_weights=file, prior=prior, learning_rate=1e-30, **settings)
        noted.append(read_best(tmp_path / "run")["step"])
        capsys.readouterr()
    assert noted == [1, 1, 3, 4]


def test_every_video_has_its_own_noise(validated, monkeypatch):  # noqa: F811
    """Else their errors would have a common part, and their mean would tell of one noise."""
    seeds = []
    monkeypatch.setattr(Pipeline, "fill", lambda self, frames, holes, embeds, seed: seeds.append(seed) or frames)
    validated(max_train_steps=1)
    assert len(seeds) == 4 and len(set(seeds)) == 2
