"""benchmarks/ablation.py: all four steps at the smallest size, its table by hand; what is done is not done again."""

import ast
import csv
import importlib
import itertools
import runpy
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TWO_BLOCKS, equal_files, error_line, reset_accelerate
from diffusers import DDPMScheduler
from scipy import stats

from benchmarks import ablation
from dataset.folders import scan_video
from libs.evaluation.cases import TASKS, Case, make_cases, rim_error
from libs.evaluation.intervals import compare
from libs.training.config import shell_variables
from toy.make_weights import SIZES


class InTurn:
    """A ThreadPoolExecutor's `map` without threads: the trainer takes signals, which the main thread alone can."""

    def __init__(self, workers):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def here(monkeypatch):
    """Commands run in this process, which has imported everything already; returns the list of them."""
    commands = []

    def run(command, gpu, log, deadline, variables=None):
        commands.append(log.stem)
        if command[0] == "bash":
            reset_accelerate()
            script = command[1].replace("finetune", "train_DiffuEraser").removesuffix(".sh")
            importlib.import_module(script).main(command[2:])
        elif command[1] == "-m":
            assert command[2] == "benchmarks.ablation"
            ablation.main(command[3:])
        else:
            monkeypatch.setattr(sys, "argv", command[1:])
            runpy.run_path(command[1], run_name="__main__")

    monkeypatch.setattr(ablation, "run_command", run)
    monkeypatch.setattr(ablation, "ThreadPoolExecutor", InTurn)
    monkeypatch.setattr(ablation, "SAMPLER_STEPS", 1)
    monkeypatch.setitem(SIZES, "tiny", TWO_BLOCKS)
    yield commands
    reset_accelerate()


def test_the_predicted_noise_is_scored_alike_for_all_arms():
    """0 for a model that knows the noise, its mean square for one that predicts none; in the hole alone."""
    masks = torch.ones(2, 1, 4, 4)
    masks[:, :, :2] = 0
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    case = Case("removal", "v", frames, frames, np.zeros((3, 32, 32), np.uint8))
    seen, answers = [], [lambda noisy: torch.cat([noisy[:, :, :2], 100 + noisy[:, :, 2:]], dim=2)]

    def model(noisy, conditioning, timesteps, prompt_embeds):
        seen.append(noisy)
        return answers[-1](noisy)

    pipeline = SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32, model=model,
        sampler=DDPMScheduler(beta_start=0.5, beta_end=0.999),  # so noisy latents are noise alone, but for 1e-4
        encode_clip=lambda *_: SimpleNamespace(conditioning=torch.cat([torch.zeros(2, 4, 4, 4), masks], dim=1)),
        encode_whole=lambda frames, noise: torch.zeros(2, 4, 4, 4),
    )  # fmt: skip

    assert ablation.noise_error(pipeline, case, 2, None, seed=3) < 1e-3

    answers.append(torch.zeros_like)
    expected = seen[0][:, :, :2].square().mean().item()
    assert ablation.noise_error(pipeline, case, 2, None, seed=3) == pytest.approx(expected, rel=1e-3)
    assert torch.equal(seen[0], seen[len(ablation.TIMESTEPS)])
    masks.fill_(1)
    assert np.isnan(ablation.noise_error(pipeline, case, 2, None, seed=3))


def test_all_steps_and_what_is_done_is_not_done_again(here, tmp_path, capsys, monkeypatch):
    flags = ["--size=tiny", f"--output_dir={tmp_path}", "--frames=2", "--seeds", "0"]
    arms = ["--arms", "guide", "all", "averaging"]
    ablation.main(["start", "train", "score", "table", *flags, *arms])
    assert here == ["start", "guide-0", "all-0", "averaging-0", "guide-0", "all-0", "averaging-0"]
    rows = list(csv.DictReader((tmp_path / "stage1/all-0.csv").read_text().splitlines()))
    assert [(row["task"], row["video"]) for row in rows] == [(t, v) for t in TASKS for v in ("buoy", "lantern")]
    assert all(np.isfinite(float(row[name])) for row in rows for name in ("psnr_hole", "warp_hole", "rim"))
    assert 0.5 < np.nanmean([float(row["noise"]) for row in rows]) < 5  # a hole may be smaller than a latents' pixel
    files = [tmp_path / f"stage1/{arm}-0/unet_main/diffusion_pytorch_model.safetensors" for arm in arms[1:]]
    assert not any(equal_files(*pair) for pair in itertools.combinations(files, 2))
    text = (tmp_path / "table-stage1.md").read_text()
    assert text in capsys.readouterr().out and "| all | " in text and "| averaging | " in text
    assert "| removal | PSNR around it: guide has " in text and "| other holes | PSNR around it" not in text

    here.clear()
    ablation.main([*flags, *arms])
    assert here == [] and (tmp_path / "table-stage1.md").read_text() == text
    line = error_line(capsys, ablation.main, ["train", *flags, "--step=3"])
    assert "unrecognized arguments: --step=3; was --steps meant?" in line
    line = error_line(capsys, ablation.main, ["train", *flags, "--steps=2"])
    assert "--steps=2: averaging takes 3 checkpoints; at least 3 steps were needed" in line
    line = error_line(capsys, ablation.main, ["train", *flags, "--arms", "guide", "--steps=4"])
    assert "{'steps': 3, 'flags': []}, not {'steps': 4, 'flags': []}" in line
    noise_error, windows = ablation.noise_error, []
    monkeypatch.setattr(ablation, "noise_error", lambda *args: windows.append(args[2]) or noise_error(*args))
    ablation.main(["train", "score", "table", *flags, "--stage=2", "--arms", "own-noises", "start", "known"])
    assert set(windows) == {3}  # frames that the motion modules are trained on, also of stage 1 itself
    assert here == ["known-0", "own-noises-0", "start-0", "known-0"]
    assert "| known | " in capsys.readouterr().out
    scores = [(tmp_path / f"stage2/{arm}-0.csv").read_text().split(",", 8)[-1] for arm in ("own-noises", "start")]
    assert scores[0] != scores[1]  # one model, other noises


def test_table_by_hand(tmp_path, capsys):
    """Three videos, two seeds: the differences are 1 and 2, 0 and 1, 2 and 3 dB; less warping error is better."""
    values = {
        ("guide", 0): [20, 21, 22],
        ("guide", 1): [21, 20, 22],
        ("mix", 0): [21, 21, 24],
        ("mix", 1): [23, 21, 25],
    }
    for (arm, seed), scores in values.items():
        rows = [
            {"arm": arm, "seed": seed, "task": "removal", "video": f"v{i}", **dict.fromkeys(ablation.SCORES, "nan"),
             "psnr_hole": score, "warp_hole": score} for i, score in enumerate(scores)
        ]  # fmt: skip
        (tmp_path / "stage1").mkdir(exist_ok=True)
        ablation.write_rows(tmp_path / f"stage1/{arm}-{seed}.csv", rows)
    ablation.main(["table", "--size=tiny", f"--output_dir={tmp_path}"])
    printed = capsys.readouterr().out
    psnr, warp = csv.DictReader((tmp_path / "table-stage1.csv").read_text().splitlines())
    assert (psnr["score"], float(psnr["baseline"]), float(psnr["mean"]), psnr["wins"]) == ("psnr_hole", 21, 1.5, "3")
    assert (warp["score"], float(warp["mean"]), warp["wins"], warp["seeds"]) == ("warp_hole", 1.5, "0", "2")
    low, high = compare(np.array([[1.0, 2.0], [0.0, 1.0], [2.0, 3.0]]))[1:3]
    assert (float(psnr["low"]), float(psnr["high"])) == (low, high)
    half = stats.t.ppf(0.975, 3.5**2 / (2**2 / 2 + 1.5**2)) * (3.5 / 6) ** 0.5  # mean squares 2, 1.5 and 0
    assert (low, high) == pytest.approx((1.5 - half, 1.5 + half))
    line = f"| mix | no difference that 3 videos can show: +1.50 dB [{low:+.2f}, {high:+.2f}], better in 3 of 3 videos"
    assert f"{line}, seeds: 2 |" in printed
    assert "| removal | PSNR in the hole: guide has 21.00 dB |" in printed


def test_a_command_has_its_gpu_and_log_and_ends_in_time(tmp_path, capfd):
    show = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[1:])"
    log, never = tmp_path / "logs/job.log", float("inf")
    ablation.run_command([sys.executable, "-c", show, "flag"], "3", log, never)
    assert log.read_text() == "3 ['flag']\n"
    ablation.run_command([sys.executable, "-c", show], "4", log, time.monotonic() + 1)  # nothing begins this late
    assert log.read_text() == "3 ['flag']\n" and not any(capfd.readouterr())


def test_what_is_set_for_another_run_is_in_no_arm(tmp_path, monkeypatch):
    """Only threads are the user's, and PYTHON is this one's."""
    show = "import os; from libs.training.config import shell_variables as names; "
    show += "print({name: os.environ[name] for name in names() if name in os.environ})"
    for name in shell_variables():
        monkeypatch.setenv(name, "3")
    ablation.run_command([sys.executable, "-c", show], "", tmp_path / "log", time.monotonic() + 1000, {"SEED": "4"})
    seen = ast.literal_eval((tmp_path / "log").read_text())
    assert seen == {"PYTHON": sys.executable, "LOG": str(tmp_path / "log"), "COMPILE": "0", "NUM_PROCESSES": "1",
                    "OMP_NUM_THREADS": "3", "SEED": "4"}  # fmt: skip
    assert {"EMA_DECAY", "LOW_MEMORY", "MASK_BORDER", "PRETRAINED_STAGE1", "WEIGHTS"} < shell_variables()


def test_jobs_that_fail_are_named_after_all_have_run(tmp_path, capsys):
    options = ["--size=tiny", f"--output_dir={tmp_path}", "--arms", "guide", "--seeds", "0", "1"]
    (tmp_path / "start/brushnet").mkdir(parents=True)
    (tmp_path / "start/brushnet/config.json").touch()
    deadlines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "run_command", lambda *args: deadlines.append(args[3]))
        line = error_line(capsys, ablation.main, ["train", *options])
    assert "2 of 2 not done (guide-0, guide-1); see " in line and line.endswith("stage1/guide-0.log")
    assert deadlines == [float("inf")] * 2  # without --minutes


def test_cases_are_the_same_for_all_arms_and_their_objects_are_others(videos):
    davis = videos / "DAVIS"
    chosen = [scan_video(davis / "JPEGImages/480p" / name) for name in ("buoy", "lantern")]
    for task in TASKS:
        first, again = (list(make_cases(task, davis, chosen, "56x32", 3)) for _ in range(2))
        for one, other in zip(first, again, strict=True):
            assert one.truth.shape == (3, 32, 56, 3) and one.holes.any()
            assert np.array_equal(one.shown, other.shown) and np.array_equal(one.holes, other.holes)
            assert np.array_equal(one.shown, one.truth) == (task != "removal")


def test_scores_by_hand():
    """A grey clip whose hole comes back 10 too bright: 28.13 dB, a step of 10 at its rim, the same for every motion."""
    truth, holes = np.full((2, 32, 32, 3), 100, np.uint8), np.zeros((2, 32, 32), np.uint8)
    holes[:, 12:20, 12:20] = 255
    shown, filled = truth.copy(), truth.copy()
    filled[holes > 0] += 10
    shown[:, 12:20, 20] = filled[:, 12:20, 20] = 140  # a rim of the object that the hole missed, and that stayed
    scores = Case("removal", "v", truth, shown, holes).score(filled)
    assert scores["psnr_hole"] == pytest.approx(20 * np.log10(255 / 10)) and scores["warp_hole"] == 0
    assert scores["psnr_left"] == pytest.approx(20 * np.log10(255 / 40)) and 20 < scores["psnr_ring"] < 40
    restored = Case("guide's holes", "v", truth, truth, holes).score(filled)  # the rim is pasted back
    assert restored["psnr_hole"] == scores["psnr_hole"] and restored["rim"] == 10
    assert np.isnan(restored["psnr_ring"]) and np.isnan(restored["psnr_left"])
    assert rim_error(truth, truth, holes > 0) == 0 and scores["rim"] == pytest.approx((10 * 3 + 30) / 4)
