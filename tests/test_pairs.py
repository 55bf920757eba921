"""Pairs of videos with and without an object: samples, what is refused, and published layouts unpacked."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from clips import encode, write_frames
from conftest import error_line
from PIL import Image

from common.errors import InputError
from dataset.finetune_dataset import FinetuneDataset, to_tensors
from dataset.folders import scan_frames
from dataset.images import BrokenFrame
from dataset.loader import TrainingClips
from dataset.pairs import scan_pairs
from libs.inference import import_pairs
from libs.training.config import parse_args
from libs.training.held_out_loss import FIXED_EPOCH, HeldOutLoss
from train_DiffuEraser_stage1 import Stage1

LENGTH, HEIGHT, WIDTH = 12, 64, 96
LEFT = (WIDTH - HEIGHT) // 2  # of the centre square
WITHOUT, WITH = 10, 200  # frame t of a pair is 10 + t everywhere, and 200 + t in the object's square


def drawn_pair(first_hole=0, x=40):
    """(with, without, masks), (12, 64, 96, ...) uint8: a square of 16 pixels at x, 24 from frame `first_hole` on."""
    times = np.arange(LENGTH, dtype=np.uint8)[:, None, None, None]
    without = np.broadcast_to(WITHOUT + times, (LENGTH, HEIGHT, WIDTH, 3)).copy()
    shown, masks = without.copy(), np.zeros((LENGTH, HEIGHT, WIDTH), np.uint8)
    shown[first_hole:, 24:40, x : x + 16] = WITH + times[first_hole:]
    masks[first_hole:, 24:40, x : x + 16] = 1  # any value above 0 is hole
    return shown, without, masks


def write_pair(folder, shown, without, masks):
    write_frames(folder / "with", shown)
    write_frames(folder / "without", without)
    (folder / "masks").mkdir()
    for i, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / "masks" / f"{i:05d}.png")


@pytest.fixture
def pairs(tmp_path):
    """A root with two pairs, a and b."""
    for name in "ab":
        write_pair(tmp_path / "pairs" / name, *drawn_pair())
    return tmp_path / "pairs"


def settings(root, **overrides):
    args = {"davis_root": "", "ytvos_root": "", "paired_root": root, "paired_share": 1.0, "nframes": 5}
    return SimpleNamespace(**{**args, "resolution": HEIGHT, **overrides})


def beside(videos, root, **overrides):
    """Settings of pairs and other videos."""
    return settings(
        root, **{"davis_root": videos / "DAVIS", "ytvos_root": videos / "YTBV", "paired_share": 0.3, **overrides}
    )


def test_a_pair_is_cleared(pairs):
    """Target without, condition with, the mask's hole; a window of consecutive frames, backwards half of the time."""
    dataset, steps, starts = FinetuneDataset(settings(pairs)), [], set()
    assert len(dataset) == 2 and not dataset.pairs
    square = (slice(None), slice(24, 40), slice(40 - LEFT, 56 - LEFT))
    for epoch in range(40):
        clip = dataset.clip(1, epoch)
        times = clip.frames[:, 0, 0, 0].astype(int) - WITHOUT
        assert abs(np.diff(times)).tolist() == [1] * 4 and len(set(np.diff(times))) == 1
        assert [int(path.stem) for path in clip.paths] == times.tolist()
        assert {path.parent for path in clip.paths} == {pairs / "b/without"}  # the latent cache keeps the target's
        assert (clip.frames == (WITHOUT + times)[:, None, None, None]).all()
        holes = np.zeros_like(clip.holes)
        holes[square] = 255
        assert np.array_equal(clip.holes, holes)
        expected = np.where(holes[..., None] > 0, (WITH + times)[:, None, None, None], clip.frames)
        assert np.array_equal(clip.conditioning_frames, expected)
        steps.append(times[1] - times[0])
        starts.add(min(times))
    assert starts == set(range(8)) and 10 <= steps.count(1) <= 30


def test_what_a_step_sees(pairs):
    """A shadow outside of the mask stays in the condition, and is not in the target."""
    for path in (pairs / "a/masks").iterdir():  # the mask misses the right half of the object
        mask = np.asarray(Image.open(path)).copy()
        mask[:, 48:] = 0
        Image.fromarray(mask).save(path)
    dataset = FinetuneDataset(settings(pairs))
    batch = TrainingClips(dataset).collate([dataset.clip(0, 0)])
    target, condition, masks = to_tensors(batch["frames"], batch["holes"], batch["conditioning_frames"])
    hole, missed = (..., slice(24, 40), slice(24, 32)), (..., slice(24, 40), slice(32, 40))
    assert (condition[hole] == -1).all() and (masks[hole] == 0).all() and (masks[missed] == 1).all()
    assert (condition[missed] > 0.5).all() and (target[missed] < -0.5).all()


def test_a_batch_of_pairs_and_others(pairs):
    """A clip of no pair is shown as it is, beside one whose object is shown."""
    dataset = FinetuneDataset(settings(pairs))
    clip = dataset.clip(0, 0)
    batch = TrainingClips(dataset).collate([replace(clip, conditioning_frames=None), clip])
    shown = np.stack([clip.frames, clip.conditioning_frames])
    assert np.array_equal(batch["conditioning_frames"], shown) and not np.array_equal(*shown)


def test_every_nth_frame_of_a_pair(pairs):
    clip = FinetuneDataset(settings(pairs, nframes=3, frame_stride=2)).clip(0, 0)
    numbers = [int(path.stem) for path in clip.paths]
    assert len(clip.frames) == len(clip.holes) == 3 and set(np.abs(np.diff(numbers))) == {2}


def test_masks_are_scaled_by_nearest(pairs):
    clip = FinetuneDataset(settings(pairs, resolution=32)).clip(0, 0)
    assert set(np.unique(clip.holes)) == {0, 255}
    assert (clip.holes > 0).sum(axis=(1, 2)).tolist() == [8 * 8] * 5
    clip = FinetuneDataset(settings(pairs, resolution=36)).clip(0, 0)  # an edge that lies within a pixel
    assert set(np.unique(clip.holes)) == {0, 255}


def test_samples_follow_from_seed_epoch_and_index(pairs, videos):
    args = beside(videos, pairs)
    first, second = FinetuneDataset(args), FinetuneDataset(args)
    plain = FinetuneDataset(beside(videos, None))
    assert len(first) == len(plain) == 44
    sources = {}
    for index in range(44):
        a, b, without_pairs = first.clip(index, 3), second.clip(index, 3), plain.clip(index, 3)
        assert np.array_equal(a.frames, b.frames) and np.array_equal(a.holes, b.holes)
        assert a.noise_seed == b.noise_seed and a.video == b.video
        sources[index] = a.video
        if a.video not in "ab":  # the other clips are what they are without pairs
            assert a.noise_seed == without_pairs.noise_seed and np.array_equal(a.frames, without_pairs.frames)
            assert a.conditioning_frames is None
    assert sources != {index: first.source(index, 4)[0].name for index in range(44)}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share(pairs, videos, share):
    dataset = FinetuneDataset(beside(videos, pairs, paired_share=share))
    names = [dataset.source(index % 44, index // 44)[0].name for index in range(500)]
    found = sum(name in "ab" for name in names) / 500
    assert abs(found - share) < (0.06 if 0 < share < 1 else 1e-9)
    assert share == 0 or 0.3 < names.count("a") / (500 * found) < 0.7


def test_a_window_with_a_hole_is_taken(tmp_path):
    """The object enters in the last frame: one window of eight has a hole."""
    write_pair(tmp_path / "pairs/late", *drawn_pair(first_hole=LENGTH - 1))
    dataset = FinetuneDataset(settings(tmp_path / "pairs"))
    for epoch in range(10):
        clip = dataset.clip(0, epoch)
        assert clip.holes.any(axis=(1, 2)).sum() == 1 and clip.frames.max() == WITHOUT + LENGTH - 1


def test_a_pair_without_a_hole_in_the_crop_is_replaced_by_name(tmp_path):
    write_pair(tmp_path / "pairs/aside", *drawn_pair(x=0))
    write_pair(tmp_path / "pairs/inside", *drawn_pair())
    dataset = FinetuneDataset(settings(tmp_path / "pairs"))
    clip = TrainingClips(dataset)[0, 0]
    assert clip.video == "inside"
    assert re.match(r"aside: .*aside/masks has no hole inside the crop", clip.broken[0])


def test_known_frames_are_cleared_ones(pairs):
    """Where a frame's hole is emptied, as where an earlier pass has filled it, the object is not shown."""
    dataset = FinetuneDataset(settings(pairs, known_frames=1))
    clip = dataset.clip(0, 0)
    known = ~clip.holes.any(axis=(1, 2))
    assert 0 < known.sum() < 5
    assert np.array_equal(clip.conditioning_frames[known], clip.frames[known])
    assert not np.array_equal(clip.conditioning_frames[~known], clip.frames[~known])


def test_a_broken_pair_is_named(pairs, videos):
    """The pair that was drawn, not the video in whose place it stood."""
    for folder in ("a", "b"):
        for path in (pairs / folder / "with").iterdir():
            path.write_bytes(path.read_bytes()[:-20])
    dataset = FinetuneDataset(beside(videos, pairs, paired_share=0.5))
    clips = TrainingClips(dataset)
    index = next(i for i in range(44) if dataset.source(i, 0)[0].name == "a")
    assert re.match(r"a: .*/a/with/000\d\d\.png is cut short", clips[0, index].broken[0])
    reasons = scan_frames(dataset.pairs, pairs / "scan.json", 1)
    assert sorted(folder.name for folder in reasons) == ["a", "b"]


def test_frames_of_another_size_within_a_pair(pairs):
    cv2.imwrite(str(pairs / "a/with/00006.png"), np.zeros((32, 48, 3), np.uint8))
    video = scan_pairs(pairs)[0]
    with pytest.raises(BrokenFrame, match=r"00006\.png is 48x32"):
        video.read()
    dataset = FinetuneDataset(settings(pairs))
    for mask in (pairs / "b/masks").iterdir():
        cv2.imwrite(str(mask), np.full((32, 48), 255, np.uint8))
    with pytest.raises(BrokenFrame, match=r"b/masks/\d+\.png is 48x32"):
        dataset.clip(1, 0)


@pytest.mark.parametrize("folder", ["a/with", "a/without", "a"])
def test_validation_videos_never_enter(pairs, videos, folder):
    dataset = FinetuneDataset(beside(videos, pairs, validation_image=[str(pairs / folder)]))
    assert [video.name for video in dataset.pairs] == ["b"]
    assert [video.name for video in dataset.validation_videos] == ["a"]
    alone = FinetuneDataset(settings(pairs, validation_image=[str(pairs / folder)]))
    assert [video.name for video in alone.videos] == ["b"]


def test_the_held_out_loss_is_not_of_pairs(pairs, videos, tmp_path):
    validation = [str(videos / "DAVIS/JPEGImages/480p/buoy")]
    dataset = FinetuneDataset(beside(videos, pairs, paired_share=1.0, validation_image=validation))
    config = SimpleNamespace(
        output_dir=tmp_path, logging_dir="logs", validation_image=validation, validation_steps=1, nframes=5,
        probe_clips=4,
    )  # fmt: skip
    fixed = HeldOutLoss(config, None, dataset, None).dataset
    assert fixed.clip(0, FIXED_EPOCH).video == "buoy" and dataset.clip(0, FIXED_EPOCH).video in "ab"


def remove(path):
    return lambda root: (root / path).unlink()


def halve(root):
    path = root / "a/with/00000.png"
    Image.open(path).resize((48, 32)).save(path)


def empty_masks(root):
    for path in (root / "b/masks").iterdir():
        Image.new("L", (WIDTH, HEIGHT)).save(path)


def empty(root):
    shutil.rmtree(root)
    (root / "Env1").mkdir(parents=True)


REFUSED = {
    "number": (remove("a/without/00003.png"), r"pairs/a: with/ has 12, without/ has 11, masks/ has 12 pictures"),
    "names": (
        lambda root: (root / "b/masks/00003.png").rename(root / "b/masks/00012.png"),
        r"pairs/b: where without/ has 00003.png, masks/ has 00004.png: equal names",
    ),
    "size": (halve, r"a/with/00000.png is 48x32, .*a/without/00000.png is 96x64: a pair's pictures need one size"),
    "no_hole": (empty_masks, r"pairs/b/masks: none of 12 masks has a hole"),
    "incomplete": (lambda root: shutil.rmtree(root / "a/masks"), r"pairs/a has no masks/: complete the pair"),
    "no_pairs": (empty, r"pairs holds no pair but 1 folder: .* libs.inference.import_pairs` unpacks"),
    "no_folder": (shutil.rmtree, r"pairs is no folder: .* check --paired_root"),
}


@pytest.mark.parametrize("damage, words", REFUSED.values(), ids=REFUSED)
def test_pairs_that_do_not_match_are_refused(pairs, damage, words):
    damage(pairs)
    with pytest.raises(InputError, match=words):
        FinetuneDataset(settings(pairs))


def test_pairs_that_are_too_short(pairs, videos):
    with pytest.raises(InputError, match=r"no pair to train on: of 2 pairs 0 .* \(the longest pair has 12\)"):
        FinetuneDataset(beside(videos, pairs, nframes=13))


@pytest.mark.parametrize(
    "given, words",
    [
        ({"paired_share": 1.5}, r"--paired_share=1.5: a share between 0 and 1"),
        ({"paired_share": 0.5}, r"--paired_share=0.5 without --paired_root"),
        (
            {"paired_root": "pairs", "paired_share": 0.5, "davis_root": "", "ytvos_root": ""},
            r"all clips come from pairs",
        ),
        (
            {"paired_root": "pairs", "masks_of_videos": "masks", "davis_root": "", "ytvos_root": ""},
            r"--masks_of_videos=masks: pairs have masks of their own, and there are no other videos; leave it out, or",
        ),
    ],
    ids=["range", "without_root", "alone", "masks"],
)
def test_settings_that_mean_nothing(flags, given, words):
    with pytest.raises(InputError, match=words):
        parse_args(Stage1, flags(1, **given))


def test_default_shares(flags):
    assert parse_args(Stage1, flags(1)).paired_share is None
    assert parse_args(Stage1, flags(1, paired_root="pairs")).paired_share == 0.3
    assert parse_args(Stage1, flags(1, paired_root="pairs", davis_root="", ytvos_root="")).paired_share == 1


def losses(output):
    """{step: loss} of a log."""
    return {int(step): loss for step, loss in re.findall(r"step (\d+)/\d+  loss ([\d.]+)", output)}


def test_a_run_with_pairs_resumes(train, pairs, videos, tmp_path, capsys):
    """Bit for bit, with latents from the cache; pairs that changed since are refused."""
    validation = {
        "validation_image": [str(videos / "DAVIS/JPEGImages/480p/buoy")],
        "validation_mask": [str(videos / "DAVIS/Annotations/480p/buoy")],
    }
    given = {"paired_root": pairs, "paired_share": 0.5, "latent_cache": tmp_path / "cache", **validation}
    train(1, output_dir=tmp_path / "whole", max_train_steps=4, **given)
    whole = losses(capsys.readouterr().out)
    train(1, max_train_steps=2, **given)
    first = losses(capsys.readouterr().out)
    train(1, max_train_steps=4, resume_from_checkpoint="latest", **{**given, "latent_cache": ""})
    assert whole == {**first, **losses(capsys.readouterr().out)}
    shutil.rmtree(pairs / "b")
    again = {"output_dir": tmp_path / "run", "max_train_steps": 5, "resume_from_checkpoint": "latest", **given}
    assert "videos, by a hash of names and lengths" in error_line(capsys, train, 1, **again)


def test_a_run_on_pairs_alone(train, pairs, tmp_path, capsys):
    train(1, paired_root=pairs, davis_root="", ytvos_root="", max_train_steps=1)
    assert sorted(losses(capsys.readouterr().out)) == [1]
    assert json.loads((tmp_path / "run/checkpoint-1/trainer_state.json").read_text())["settings"]["paired_share"] == 1
    assert "- data: pairs\n" in (tmp_path / "run/README.md").read_text()


def test_the_table_names_the_pairs(train, pairs, capsys):
    with pytest.raises(SystemExit) as stop:
        train(1, paired_root=pairs, scan_data=True, check_only=True)
    assert stop.value.code == 0
    assert "44 clips an epoch, 30% of them of 2 pairs, 24 frames" in capsys.readouterr().out


# Published layouts, drawn by the tests: what each file holds is said in libs/inference/import_pairs.py.


def write_mp4s(shown, without, mask, grey, times=slice(None)):
    """A drawn pair as lossless mp4s at three paths, with `grey` (12, 64, 96) as its mask."""
    frames = (*drawn_pair()[:2], np.stack([grey] * 3, axis=-1))
    for path, pictures in zip((shown, without, mask), frames, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(path, pictures[times], pixels="yuv444p")


MASKS = drawn_pair()[2] > 0
WHITE = np.where(MASKS, 255, 0).astype(np.uint8)


def rose(root):
    for scene in ("Env1", "Env12"):
        write_mp4s(*(root / f"{scene}/{scene}_{kind}/Seq_7.mp4" for kind in ("Unedited", "Edited", "Masked")), WHITE)
    bench = root / "Benchmark/shadow"  # for evaluation
    write_mp4s(*(bench / f"{kind}/example-1.mp4" for kind in ("Unedited", "Edited", "Masked")), WHITE)
    return ["Env12_Seq_7", "Env1_Seq_7"]


def vor(root):
    train = [root / "VOR-Train/FG_BG", root / "VOR-Train/BG", root / "VOR-Train-MASK/MASK"]
    evaluation = [root / "VOR-Eval" / name for name in ("FG_BG", "BG", "MASK")]
    second = [root / "part2" / name for name in ("FG_BG", "BG", "MASK")]
    for folders, name in ((train, "REAL_ENV105_00001_001_03"), (evaluation, "BLENDER_1"), (second, "REAL_ENV106")):
        write_mp4s(*(folder / f"{name}.mp4" for folder in folders), WHITE)
    return ["REAL_ENV105_00001_001_03", "REAL_ENV106"]


def gen_omnimatte(root):
    trimask = np.where(MASKS, 0, 128).astype(np.uint8)
    trimask[:, :8, :8] = 255  # an object that stays
    write_mp4s(*(root / f"kubric/000003/{name}.mp4" for name in ("rgb_full", "rgb_removed", "mask")), trimask)
    return ["kubric_000003"]


def void(root):
    quadmask = np.where(MASKS, 0, 255).astype(np.uint8)
    quadmask[:, 24:32, 40:56] = 63  # the object, where something else changes too
    quadmask[:, 40:48, 40:56] = 127  # such a change elsewhere
    for folder, removed in (("seq", "rgb_removed"), ("00000", "rgb_altered_physics")):
        write_mp4s(*(root / f"{folder}/{name}.mp4" for name in ("rgb_full", removed, "mask")), quadmask)
        (root / folder / "metadata.json").write_text("{}")
    return ["00000", "seq"]


@pytest.mark.parametrize("layout", [rose, vor, gen_omnimatte, void])
def test_a_published_layout_is_unpacked(tmp_path, capsys, layout):
    names = layout(tmp_path / "source")
    import_pairs.main([str(tmp_path / "source"), str(tmp_path / "pairs")])
    assert f"{len(names)} of {len(names)} pairs are in {tmp_path}/pairs: train with" in capsys.readouterr().out
    found = scan_pairs(tmp_path / "pairs")
    assert sorted(video.name for video in found) == sorted(names)
    shown, without, masks = drawn_pair()
    for video in found:
        assert len(video.frames) == LENGTH and video.size == f"{WIDTH}x{HEIGHT}"
        for i in range(LENGTH):
            assert abs(cv2.imread(str(video.frames[i])).astype(int) - without[i]).max() <= 3
            inside = cv2.imread(str(video.with_frames[i])).astype(int)[26:38, 42:54]
            assert abs(inside - shown[i, 26:38, 42:54]).max() <= 8
            assert np.array_equal(cv2.imread(str(video.masks[i]), cv2.IMREAD_UNCHANGED), masks[i] * 255)


def test_nothing_is_overwritten_and_what_is_no_pair_is_named(tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "pairs"
    rose(source)
    folders = [source / f"Env1/Env1_{kind}" for kind in ("Unedited", "Edited", "Masked")]
    write_mp4s(*(folder / "holeless.mp4" for folder in folders), WHITE * 0)
    write_mp4s(*(folder / "short.mp4" for folder in folders), WHITE, times=slice(5))
    shutil.copy(folders[1] / "holeless.mp4", folders[1] / "short.mp4")
    (folders[2] / "Seq_7.mp4").unlink()
    (target / ".Env1_short.partial").mkdir(parents=True)
    for name in ("with", "without", "masks"):
        (target / "Env12_Seq_7" / name).mkdir(parents=True)
    import_pairs.main([str(source), str(target)])
    output = capsys.readouterr()
    assert "Env12_Seq_7  is there already" in output.out and "1 of 4 pairs are in" in output.out
    assert re.search(r"left out: Env1_Seq_7: .*Masked/Seq_7.mp4 does not exist", output.err)
    assert re.search(r"Env1_short: .* has 5 frames of 96x64, .* has 12 frames of 96x64", output.err)
    assert "holeless.mp4 has no hole in any frame" in output.err
    assert not list((target / "Env12_Seq_7").glob("*/*"))
    assert [path.name for path in target.iterdir() if not path.name.startswith(".")] == ["Env12_Seq_7"]


def test_names_that_are_taken(tmp_path, capsys):
    """By another pair, a file or a link of the user's; what training would pass over is no pair."""
    source, target = tmp_path / "source", tmp_path / "pairs"
    for folder in ("a/b_c", "a_b/c", "d", "e", ".Trash/f"):
        files = (source / folder / f"{name}.mp4" for name in ("rgb_full", "rgb_removed", "mask"))
        write_mp4s(*files, 255 - WHITE, times=slice(2))
    target.mkdir()
    (target / "d").write_text("mine")
    (target / "e").symlink_to("nowhere")
    import_pairs.main([str(source), str(target)])
    output = capsys.readouterr()
    assert "1 of 4 pairs are in" in output.out and (target / "d").read_text() == "mine"
    assert f"left out: a_b_c: {source}/a_b/c/rgb_full.mp4 and {source}/a/b_c/rgb_full.mp4 get one name" in output.err
    for name in ("d", "e"):
        assert f"left out: {name}: {target}/{name} is there and no pair: move it" in output.err
    assert sorted(path.name for path in target.iterdir()) == ["a_b_c", "d", "e"]


def test_a_folder_of_no_known_layout(tmp_path, capsys):
    (tmp_path / "source/frames").mkdir(parents=True)
    line = error_line(capsys, import_pairs.main, [str(tmp_path / "source"), str(tmp_path / "pairs")])
    assert "holds no pairs in a known layout (1 folder): docs/data.md shows them" in line
    assert not Path(tmp_path, "pairs").exists()
