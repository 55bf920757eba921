"""Evaluations of many videos: protocols by hand, seeds, going on after a kill, damaged videos, several processes."""

import csv
import json
import multiprocessing
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from clips import moving_video, write_frames
from conftest import error_line
from PIL import Image

import eval_DiffuEraser
from common.errors import InputError
from libs.comparison import methods, scoring
from libs.comparison.plan import Plan, files_of_weights, short_hash
from libs.comparison.protocols import PROTOCOLS
from libs.comparison.results import Results
from libs.evaluation.metrics import psnr

NAMES = ("pond", "road", "tree")
FILES = ("scores.csv", "means.csv", "comparisons.csv", "evaluation.json")


@pytest.fixture
def data(tmp_path):
    """frames/ and masks/ of three videos, 4 frames of 40x32, each another part of one panning texture."""
    frames, holes = moving_video(12, 32, 40, pan=3)
    for i, name in enumerate(NAMES):
        write_frames(tmp_path / "frames" / name, frames[4 * i : 4 * i + 4])
        write_frames(tmp_path / "masks" / name, np.repeat(holes[4 * i : 4 * i + 4, ..., None], 3, axis=3))
    return tmp_path


@pytest.fixture
def evaluate(data):
    """Plain methods on the videos of `data`: evaluate(output, flags) writes data/output."""

    def run(output, *flags, masks=True):
        given = [f"--masks={data / 'masks'}"] if masks else []
        eval_DiffuEraser.main([f"--frames={data / 'frames'}", *given, "--no_model", "--baselines", "telea",
                               "mean-colour", f"--output_dir={data / output}", *flags])  # fmt: skip
        return data / output

    return run


def parse(*flags):
    args = eval_DiffuEraser.build_parser().parse_args(["--no_model", *flags])
    return args, eval_DiffuEraser.check(args)


def read_clip(number, *flags, seed=42):
    args, plan = parse(*flags)
    return plan.protocol.read(plan.folders[number], number, seed, args)


def read_table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def contents(folder):
    """The bytes of the result; the page's clips are left out, as x264 gives other ones once in a hundred times."""
    assert (folder / "report.html").stat().st_size > 10_000
    return [(folder / name).read_bytes() for name in FILES]


def test_propainters_protocol_by_hand(tmp_path):
    """Masks by the frames' place, frames bilinear, what is above 0 grown by four steps of a cross: a diamond."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 480, 864, 3), np.uint8)
    for name, frame in zip(("00000", "00005", "00010"), noise, strict=True):  # as YouTube-VOS counts
        write_frames(tmp_path / "one", frame[None])
        (tmp_path / "frames/boat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "one/00000.png").rename(tmp_path / f"frames/boat/{name}.png")
    for place in range(3):
        mask = np.zeros((240, 432), np.uint8)
        mask[100, 100 + 20 * place] = 1  # faint, and no two alike
        (tmp_path / "masks/boat").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"masks/boat/{place:05d}.png")
    (tmp_path / "frames/no-masks").mkdir()
    folders = [f"--frames={tmp_path / 'frames'}", f"--masks={tmp_path / 'masks'}"]
    clip = read_clip(0, *folders, "--protocol=propainter-davis")
    assert clip.truth is clip.shown and clip.truth.shape == (3, 240, 432, 3)
    # At half the size a bilinear sample is the mean of the two by two pixels around it.
    mean = noise.reshape(3, 240, 2, 432, 2, 3).mean(axis=(2, 4))
    assert np.abs(clip.truth - mean).max() <= 1
    rows, columns = np.mgrid[:240, :432]
    for place in range(3):
        assert np.array_equal(clip.holes[place] > 0, abs(rows - 100) + abs(columns - 100 - 20 * place) <= 4)
    (tmp_path / "masks/boat/00002.png").unlink()
    with pytest.raises(InputError, match=r"00002\.png is missing: ProPainter's test masks have one for every frame"):
        parse(*folders, "--protocol=propainter-davis")


def test_bilinear_without_averaging_is_what_moves_the_score(tmp_path):
    """Shrunk to a third, the protocol takes the middle pixels as they are; by area it would be their mean."""
    frame = np.zeros((720, 1296, 3), np.uint8)
    frame[1::3, 1::3] = 255
    write_frames(tmp_path / "frames/dots", frame[None])
    write_frames(tmp_path / "masks/dots", np.full((1, 240, 432, 3), 255, np.uint8))
    folders = [f"--frames={tmp_path / 'frames'}", f"--masks={tmp_path / 'masks'}"]
    assert (read_clip(0, *folders, "--protocol=propainter-ytvos").truth == 255).all()
    assert cv2.resize(frame, (432, 240), interpolation=cv2.INTER_AREA).max() < 30


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--protocol=propainter-davis", "--size=80x48"], "--protocol=propainter-davis takes 432x240; leave it out"),
        (["--protocol=davis-removal", "--size=80x48"], "--protocol=davis-removal takes frames as they are"),
        (["--protocol=propainter-davis", "--mask_span=0.1,0.2"], "--mask_span is about synthetic holes"),
        (["--protocol=propainter-davis", "--mask_span=original"], "--mask_span is about synthetic holes"),
        (["--mask_span=0.1,0.2"], "--mask_span is about synthetic holes, which --masks="),
        (["--compare_with", "a", "b"], "--compare_with=a b: --no_model scores no folders"),
        (["--protocol=pairs"], "--masks: --protocol=pairs takes the masks that lie in --frames"),
        (["--protocol=pairs", "--masks="], "has no with/"),
        (["--protocol=propainter-davis", "--masks="], "--protocol=propainter-davis needs --masks"),
        (["--protocol=pasted-objects", "--prior=frames"], "--prior=frames: --protocol=pasted-objects takes one of"),
        (["--protocol=davis-removal", "--i3d_weights=x.pt"], "--i3d_weights: VFID needs true videos"),
        (["--masks=", "--prior=frames", "--seeds=2"], "--prior=frames --seeds=2: every seed draws other holes"),
        (["--seeds=0"], "--seeds=0: 1 or more"),
        (["--seeds=1001"], "--seeds=1001: at most 1000"),
        (["--num_processes=0"], "--num_processes=0: 1 or more"),
        (["--masks=nowhere"], "nowhere is no folder: --masks needs"),
        (["--protocol=best"], "invalid choice"),
    ],
)
def test_contradictions_are_one_line_before_anything_is_written(evaluate, data, capsys, flags, expected):
    assert expected in error_line(capsys, evaluate, "out", *flags)
    assert not (data / "out").exists()


def test_frames_that_another_method_made_are_scored_in_the_protocols_size(data, capsys):
    """As ProPainter's evaluation saves them: 432x240, from frames that are larger."""
    write_frames(data / "frames/large", cv2.resize(moving_video(2, 32, 40)[0][0], (864, 480))[None])
    masks = np.zeros((1, 480, 864, 3), np.uint8)
    masks[:, 200:300, 300:500] = 255
    write_frames(data / "masks/large", masks)
    flags = [f"--frames={data / 'frames'}", f"--masks={data / 'masks'}", "--videos", "large", "--no_model",
             f"--prior={data / 'prior'}", "--baselines", "telea"]  # fmt: skip
    truth = read_clip(0, *flags[:4], "--protocol=propainter-davis").truth
    write_frames(data / "prior/large", truth)
    eval_DiffuEraser.main([*flags, f"--output_dir={data / 'out'}", "--protocol=propainter-davis"])
    rows = {row["method"]: row for row in read_table(data / "out/scores.csv")}
    assert rows[f"prior {data / 'prior'}"]["psnr"] == "inf" != rows["telea"]["psnr"]
    capsys.readouterr()
    assert "needs frames of the video's size" in error_line(capsys, eval_DiffuEraser.main, flags)


def test_frames_whose_numbers_have_no_leading_zeros_meet_their_prior(data):
    frames = np.stack([np.full((240, 432, 3), 20 * i, np.uint8) for i in range(12)])
    for part, pictures in (("frames", frames), ("prior", frames), ("masks", np.full_like(frames, 255))):
        write_frames(data / part / "long", pictures)
    for path in (data / "frames/long").iterdir():
        path.rename(path.with_stem(str(int(path.stem))))
    eval_DiffuEraser.main([f"--frames={data / 'frames'}", f"--masks={data / 'masks'}", "--videos", "long", "--no_model",
                           f"--prior={data / 'prior'}", "--baselines", "--protocol=propainter-davis",
                           f"--output_dir={data / 'out'}"])  # fmt: skip
    assert read_table(data / "out/scores.csv")[1]["ssim"] == "1.0"


def test_removal_without_truth(evaluate, capsys):
    """Nothing is compared with what nobody knows: the background alone is scored, and the hole has grown."""
    folder = evaluate("out", "--protocol=davis-removal")
    head = next(line for line in capsys.readouterr().out.splitlines() if "frames   " in line)
    assert head.split() == ["frames", "PSNR", "bg", "SSIM", "bg"]
    assert {row["method"] for row in read_table(folder / "means.csv")} == {"telea", "mean-colour"}
    assert all(row["psnr_background"] == "inf" for row in read_table(folder / "scores.csv"))
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["protocol"]["truth"] == "not known" and "dilated 4 times" in written["protocol"]["masks"]
    frames = folder.parent / "frames"
    grown = read_clip(0, f"--frames={frames}", f"--masks={folder.parent / 'masks'}", "--protocol=davis-removal")
    own = read_clip(0, f"--frames={frames}", f"--masks={folder.parent / 'masks'}")
    assert grown.truth is None and np.array_equal(own.truth, own.shown)
    assert np.count_nonzero(grown.holes) > np.count_nonzero(own.holes) and (grown.holes >= own.holes).all()


def test_pairs_are_scored_against_the_video_without_the_object(data, capsys):
    """A shadow outside the mask is part of the score: nothing is pasted back."""
    truth, holes = moving_video(3, 32, 40)
    shown = truth.copy()
    shown[holes > 0] = 255
    shown[:, 26:30] //= 2  # the shadow
    for name, frames in (("with", shown), ("without", truth), ("masks", np.repeat(holes[..., None], 3, axis=3))):
        write_frames(data / "pairs/cup" / name, frames)
    folder = data / "out"
    eval_DiffuEraser.main([f"--frames={data / 'pairs'}", "--protocol=pairs", "--no_model", "--baselines", "telea",
                           f"--output_dir={folder}"])  # fmt: skip
    clip = read_clip(0, f"--frames={data / 'pairs'}", "--protocol=pairs")
    assert np.array_equal(clip.truth, truth) and np.array_equal(clip.shown, shown)
    assert np.array_equal(clip.holes, holes)
    rows = {row["method"]: row for row in read_table(folder / "scores.csv")}
    assert rows["the video itself"]["psnr"] == "inf"
    filled = shown.copy()
    filled[holes > 0] = truth[holes > 0]
    at_best = np.mean([psnr(*pair) for pair in zip(truth, filled, strict=True)])
    assert float(rows["telea"]["psnr"]) < at_best < 30


def test_pasted_objects_follow_from_the_seed_and_are_others(data):
    flags = (f"--frames={data / 'frames'}", f"--masks={data / 'masks'}", "--protocol=pasted-objects")
    one, again, other = (read_clip(1, *flags, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.shown, again.shown) and np.array_equal(one.holes, again.holes)
    assert not np.array_equal(one.shown, other.shown) and np.array_equal(one.truth, other.truth)
    changed = (one.shown != one.truth).any(axis=-1)
    assert changed.any() and (changed & (one.holes > 0)).any()
    (data / "masks/pond").rename(data / "masks/nobody")
    (data / "masks/tree").rename(data / "masks/no-one")
    with pytest.raises(InputError, match="objects of other videos were needed"):
        parse(*flags)


def test_seeds_change_drawn_holes_and_nothing_else_of_plain_methods(evaluate, capsys):
    drawn, given = evaluate("drawn", "--seeds=3", masks=False), evaluate("given", "--seeds=3")
    printed = capsys.readouterr().out
    once = evaluate("once", "--seed=43", masks=False)
    rows = read_table(drawn / "scores.csv")
    assert len(rows) == 3 * 3 * 3  # videos, seeds and methods, the video itself among them
    assert [row for row in rows if row["seed"] == "43"] == read_table(once / "scores.csv")
    of_telea = {row["psnr_hole"] for row in rows if (row["method"], row["video"]) == ("telea", "pond")}
    assert len(of_telea) == 3
    rows = read_table(given / "scores.csv")
    assert len({row["psnr_hole"] for row in rows if (row["method"], row["video"]) == ("telea", "pond")}) == 1
    for folder, seeds in ((drawn, "3"), (given, "1")):
        found = next(row for row in read_table(folder / "comparisons.csv") if row["score"] == "psnr_hole")
        assert (found["method"], found["videos"], found["seeds"]) == ("mean-colour", "3", seeds)
        values = {(row["method"], row["video"], row["seed"]): float(row["psnr_hole"])
                  for row in read_table(folder / "scores.csv")}  # fmt: skip
        gain = [value - values["telea", *key[1:]] for key, value in values.items() if key[0] == "mean-colour"]
        assert float(found["mean"]) == pytest.approx(np.mean(gain))
        assert f"  mean-colour  {found['verdict']}" in printed
    means = {row["method"]: row for row in read_table(drawn / "means.csv")}
    rows = [row for row in read_table(drawn / "scores.csv") if row["method"] == "telea"]
    assert float(means["telea"]["psnr"]) == pytest.approx(np.mean([float(row["psnr"]) for row in rows]))
    assert means["telea"]["frames"] == "12"


def test_many_folders_beside_the_first_one(weights, data, capsys):
    """Three copies of the same weights: no difference, and the first is what the others are compared with."""
    folders = [weights / "diffuEraser", data / "b", data / "c"]
    for link in folders[1:]:
        link.symlink_to(folders[0])
    models = [f"--base_model_name_or_path={weights / 'stable-diffusion-v1-5'}", "--num_inference_steps=1",
              f"--vae_path={weights / 'sd-vae-ft-mse'}", f"--weights={folders[0]}"]  # fmt: skip
    others = ["--compare_with", *map(str, folders[1:])]
    eval_DiffuEraser.main([f"--frames={data / 'frames'}", f"--masks={data / 'masks'}", "--seeds=2",
                           "--baselines", "telea", *others, *models, f"--output_dir={data / 'out'}"])  # fmt: skip
    written = json.loads((data / "out/evaluation.json").read_text())
    assert written["reference"] == f"baseline {folders[1]}" and len(written["methods"]) == 4
    assert [method["kind"] for method in written["methods"]] == ["baseline", *["weights"] * 3]
    rows = [row for row in read_table(data / "out/comparisons.csv") if row["score"] == "psnr_hole"]
    assert rows.pop(0)["method"] == "telea"  # the best one, as these weights are random
    assert {row["method"] for row in rows} == {f"baseline {folders[2]}", str(folders[0])}
    assert all(float(row["mean"]) == 0 and row["wins"] == "0" and row["seeds"] == "2" for row in rows)
    scores = read_table(data / "out/scores.csv")
    of_pond = {row["psnr_hole"] for row in scores if (row["method"], row["video"]) == (str(folders[0]), "pond")}
    assert len(of_pond) == 2  # the noise follows from the seed
    assert f"Beside baseline {folders[1]}, with 95 % intervals" in capsys.readouterr().out


def test_every_video_has_a_noise_of_its_own(weights, data, monkeypatch):
    seen = []

    def fill_with(args, weights):
        return lambda clip, prior, seed: seen.append(seed) or clip.shown

    monkeypatch.setattr(methods, "fill_with", fill_with)
    eval_DiffuEraser.main([f"--frames={data / 'frames'}", f"--masks={data / 'masks'}", "--baselines", "--seeds=2",
                           f"--weights={weights / 'diffuEraser'}", f"--output_dir={data / 'out'}"])  # fmt: skip
    assert seen == [42, 43, 1042, 1043, 2042, 2043]


def test_the_same_command_goes_on_where_it_was_killed(evaluate, data, monkeypatch, capsys):
    """The table is the same to the bit, and what was scored is not scored again."""
    flags = ("--seeds=2",)
    whole = contents(evaluate("whole", *flags, masks=False))
    score_clip, scored = scoring.score_clip, []

    def killed(plan, tools, number, seed, *rest):
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append((number, seed))
        return score_clip(plan, tools, number, seed, *rest)

    monkeypatch.setattr(scoring, "score_clip", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate("out", *flags, masks=False)
    assert scored == [(0, 42), (0, 43), (1, 42)] and not (data / "out/scores.csv").exists()
    monkeypatch.setattr(scoring, "score_clip", lambda *given: scored.append(given[2:4]) or score_clip(*given))
    folder = evaluate("out", *flags, masks=False)
    assert scored[3:] == [(1, 43), (2, 42), (2, 43)] and "3 of 6 scored before" in capsys.readouterr().out
    assert contents(folder) == whole
    for again in (flags, ("--seeds=1",), flags):  # fewer seeds, and all of them again
        evaluate("out", *again, masks=False)
    assert len(scored) == 6 and contents(folder) == whole
    evaluate("out", "--seeds=3", masks=False)  # and one more
    assert scored[6:] == [(0, 44), (1, 44), (2, 44)]


def test_other_settings_are_refused_in_one_line(evaluate, data, capsys):
    folder = evaluate("out")
    before = contents(folder)
    line = error_line(capsys, evaluate, "out", "--size=36x30")
    assert f'{folder} holds an evaluation with protocol.size="the frames\' own", not "36x30": choose another' in line
    assert contents(folder) == before
    evaluate("out", "--size=36x30", "--overwrite")
    assert json.loads((folder / "evaluation.json").read_text())["protocol"]["size"] == "36x30"
    assert "settings.seed=42, not 7" in error_line(capsys, evaluate, "out", "--size=36x30", "--seed=7")
    (folder / "evaluation.json").unlink()  # then nothing tells what was scored
    assert "protocol.name=null" in error_line(capsys, evaluate, "out", "--size=36x30")
    for damaged in ("{", "[]"):
        (folder / "evaluation.json").write_text(damaged)
        assert "protocol.name=null" in error_line(capsys, evaluate, "out")


@pytest.mark.parametrize("output", ["frames", "frames/out", "masks/out"])
def test_an_output_folder_among_the_videos_is_refused(evaluate, data, capsys, output):
    """It would be one of them the next time."""
    line = error_line(capsys, evaluate, output)
    assert f"is in {data / output.split('/')[0]}, whose folders count as videos: choose another" in line
    assert not list(data.rglob("evaluation.json"))
    if output == "frames/out":
        evaluate(output, "--videos", "pond")


def test_an_output_folder_among_a_priors_is_taken(evaluate, data):
    """Nobody looks there for videos, and results of one method may lie beside comparisons with it."""
    shutil.copytree(data / "frames", data / "perfect")
    for _ in range(2):
        evaluate("perfect/out", f"--prior={data / 'perfect'}")


def test_files_behind_linked_folders_count(tmp_path):
    """Weights put together of links, pairs whose with/ lies elsewhere."""
    write_frames(tmp_path / "elsewhere", moving_video(2, 32, 40)[0])
    (tmp_path / "elsewhere/model.safetensors").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/unet_main").symlink_to(tmp_path / "elsewhere")
    assert [path.name for path in files_of_weights(tmp_path / "linked")] == ["model.safetensors"]
    before = short_hash([tmp_path / "linked"])
    write_frames(tmp_path / "elsewhere", moving_video(2, 36, 40)[0])
    assert short_hash([tmp_path / "linked"]) != before


def test_a_hole_that_vanishes_and_a_name_as_long_as_can_be(evaluate, data, capsys):
    """The one is named and left out, the other, of 228 bytes, is scored."""
    mask = np.zeros((1, 32, 40, 3), np.uint8)
    mask[:, 0, 0] = 255
    for frame in range(4):
        Image.fromarray(mask[0]).save(data / f"masks/road/{frame:05d}.png")
    long = "很" * 76
    for part in ("frames", "masks"):
        (data / part / "pond").rename(data / part / long)
    error = error_line(capsys, evaluate, "out", "--size=20x16")
    assert "road has no hole left at 20x16: raise --size, or leave the video out" in error
    assert {row["video"] for row in read_table(data / "out/scores.csv")} == {long, "tree"}


def test_another_methods_frames_can_be_scored_alone(data):
    shutil.copytree(data / "frames", data / "perfect")
    eval_DiffuEraser.main([f"--frames={data / 'frames'}", "--no_model", "--baselines", f"--prior={data / 'perfect'}",
                           f"--output_dir={data / 'out'}"])  # fmt: skip
    rows = read_table(data / "out/means.csv")
    assert [row["method"] for row in rows] == [methods.TRUTH, f"prior {data / 'perfect'}"]
    assert rows[1]["psnr"] == "inf"


def test_a_video_that_cannot_be_scored_is_left_out(evaluate, data, capsys, monkeypatch):
    """Memory runs out for one of them, or a network cannot take it: the others' scores are not lost."""
    score_clip = scoring.score_clip

    def fail(plan, tools, number, *others):
        if number == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return score_clip(plan, tools, number, *others)

    monkeypatch.setattr(scoring, "score_clip", fail)
    assert "1 of 3 videos left out: road (CUDA out of memory.)" in error_line(capsys, evaluate, "out")
    assert {row["video"] for row in read_table(data / "out/scores.csv")} == {"pond", "tree"}


def test_a_damaged_video_is_named_and_the_others_are_scored(evaluate, data, capsys, monkeypatch):
    """And once it is mended, the same command scores it alone: the table is that of a run without damage."""
    whole = contents(evaluate("whole"))
    frame = data / "frames/tree/00003.png"
    content = frame.read_bytes()
    frame.write_bytes(content[:200])
    with pytest.raises(SystemExit) as stop:
        evaluate("out")
    output = capsys.readouterr()
    assert stop.value.code == 1 and "telea" in output.out and "mean-colour" in output.out
    (line,) = output.err.splitlines()
    assert line.startswith(f"error: 1 of 3 videos left out: tree ({frame} is cut short (200 bytes)); mend them")
    written = json.loads((data / "out/evaluation.json").read_text())
    assert written["videos"] == ["pond", "road"] and list(written["left_out"]) == ["tree"]
    assert {row["video"] for row in read_table(data / "out/scores.csv")} == {"pond", "road"}
    assert {row["videos"] for row in read_table(data / "out/means.csv")} == {"2"}
    frame.write_bytes(content)
    scored, score_clip = [], scoring.score_clip
    monkeypatch.setattr(scoring, "score_clip", lambda *given: scored.append(given[2]) or score_clip(*given))
    assert contents(evaluate("out")) == whole and scored == [2]
    for name in NAMES:
        (data / "frames" / name / "00000.png").write_bytes(b"")
    assert "00000.png is empty" in error_line(capsys, evaluate, "none")


def test_changed_frames_are_scored_again(evaluate, data):
    folder = evaluate("out")
    before = read_table(folder / "scores.csv")
    write_frames(data / "frames/road", 255 - moving_video(4, 32, 40)[0])
    after = read_table(evaluate("out") / "scores.csv")
    changed = {row["video"] for row, old in zip(after, before, strict=True) if row != old}
    assert changed == {"road"}


def test_two_processes_share_the_videos(evaluate, data, capfd):
    whole = contents(evaluate("one", "--seeds=2", masks=False))
    assert contents(evaluate("two", "--seeds=2", "--num_processes=2", masks=False)) == whole
    assert len(list((data / "two/scored").iterdir())) == 6


def test_a_process_that_fails_is_said(evaluate, data, capfd, monkeypatch):
    """By the last line, after those of the process itself."""
    forked = multiprocessing.get_context("fork")  # which imports nothing anew
    monkeypatch.setattr(scoring.multiprocessing, "get_context", lambda method: forked)
    monkeypatch.setattr(scoring, "score_in_process", fail)
    with pytest.raises(SystemExit):
        evaluate("out", "--num_processes=2")
    assert "2 of 2 processes failed (exit status 3), see above: the same command goes on" in capfd.readouterr().err


def fail(*_):
    raise SystemExit(3)


def test_every_protocol_says_what_it_fixes():
    for name, protocol in PROTOCOLS.items():
        assert protocol.rules and protocol.masks in ("needed", "refused"), name
        assert bool(protocol.published) == name.startswith("propainter")


def test_other_sets_than_the_published_are_said(evaluate, capsys):
    evaluate("out", "--protocol=propainter-davis", "--baselines", "mean-colour", "--videos", "pond")
    assert "1 videos: published numbers are of 50, and compare with those of no other set" in capsys.readouterr().out


def test_names_that_come_twice_are_refused(data):
    (data / "frames/deep/pond").mkdir(parents=True)
    write_frames(data / "frames/deep/pond", moving_video(2, 32, 40)[0])
    with pytest.raises(InputError, match="two videos are called pond"):
        parse(f"--frames={data / 'frames'}", "--videos", "pond", "deep/pond")


def test_a_plan_that_changed_meanwhile(evaluate, data):
    folder = evaluate("out")
    _, plan = parse(f"--frames={data / 'frames'}", f"--masks={data / 'masks'}", "--baselines", "telea",
                       f"--output_dir={folder}")  # fmt: skip
    assert isinstance(plan, Plan) and Path(folder, "scored/00000-42.json").is_file()
    (data / "frames/pond/00000.png").touch()
    with pytest.raises(InputError, match="pond has changed while it was scored"):
        Results(plan)
