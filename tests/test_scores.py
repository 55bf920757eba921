"""Scores against independent computations, and what they must say of videos whose answer is known."""

import cv2
import numpy as np
import pytest
from clips import moving_video
from skimage.metrics import structural_similarity

from libs.evaluation.baselines import BASELINES
from libs.evaluation.metrics import Reference, average, psnr, ssim, table, track
from libs.report.gather import average_by_step


@pytest.fixture(scope="module")
def video():
    """(frames, holes): 5 frames of 80x100, and a hole that moves."""
    return moving_video(5, 80, 100)


def test_psnr_and_ssim_are_those_of_the_same_arrays(video):
    """PSNR by its formula, SSIM by scikit-image as ProPainter's evaluation calls it, pooled over frames."""
    frames, holes = video
    rng = np.random.default_rng(0)
    result = np.clip(frames + rng.normal(0, 20, frames.shape), 0, 255).astype(np.uint8)
    found = Reference(frames, holes).score(result)
    a, b = frames.astype(np.float64), result.astype(np.float64)
    by_formula = [20 * np.log10(255 / np.sqrt(np.mean((x - y) ** 2))) for x, y in zip(a, b, strict=True)]
    assert found["psnr"] == pytest.approx(np.mean(by_formula), abs=1e-9)
    in_hole = [20 * np.log10(255 / np.sqrt(np.mean((x - y)[h > 0] ** 2))) for x, y, h in zip(a, b, holes, strict=True)]
    assert found["psnr_hole"] == pytest.approx(np.mean(in_hole), abs=1e-9)
    similar, maps = zip(*(
        structural_similarity(x, y, data_range=255, channel_axis=-1, win_size=65, full=True)
        for x, y in zip(a, b, strict=True)
    ), strict=True)  # fmt: skip
    assert found["ssim"] == pytest.approx(np.mean(similar), abs=1e-12)
    in_hole = [local[hole > 0].mean() for local, hole in zip(maps, holes, strict=True)]
    assert found["ssim_hole"] == pytest.approx(np.mean(in_hole), abs=1e-12)


def test_the_background_is_scored_before_known_pixels_are_pasted_back(video):
    """Against the truth where there is one, else against what was shown; the hole has no part in it."""
    frames, holes = video
    rng = np.random.default_rng(0)
    raw = np.clip(frames + rng.normal(0, 20, frames.shape), 0, 255).astype(np.uint8)
    pasted = np.where(holes[..., None] > 0, raw, frames)
    other_hole = np.where(holes[..., None] > 0, 255 - raw, raw)
    psnrs, similar = [], []
    for frame, result, hole in zip(frames, raw, holes, strict=True):
        known = hole == 0
        psnrs.append(psnr(frame[known], result[known]))
        black = [picture * known[..., None] for picture in (frame, result)]
        _, local = structural_similarity(*black, data_range=255, channel_axis=-1, win_size=65, full=True)
        similar.append(local[known].mean())
    expected = {"psnr_background": np.mean(psnrs), "ssim_background": np.mean(similar)}
    for reference in (Reference(frames, holes, shown=raw), Reference(None, holes, shown=frames)):
        for before_pasting in (raw, other_hole):
            found = reference.score(pasted, before_pasting)
            assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert Reference(frames, holes).score(raw, pasted)["psnr_background"] == np.inf


def test_what_the_next_frame_does_not_show_is_not_visible():
    """Columns that a pan takes out of the frame, and what an object moves in front of."""
    frames, _ = moving_video(2, 80, 100, pan=3)
    target, visible = track(*frames)
    assert not visible[:, :3].any() and visible[:, 10:].mean() > 0.95
    assert np.abs(target - np.dstack(np.meshgrid(np.arange(100), np.arange(80))) + [3, 0])[visible].mean() < 0.1
    before, after = np.repeat(frames[:1], 2, axis=0)
    square = cv2.resize(np.random.default_rng(0).uniform(0, 255, (8, 8, 3)), (24, 24)).astype(np.uint8)
    before[30:54, 30:54] = after[30:54, 42:66] = square
    _, visible = track(before, after)
    assert visible[32:52, 56:65].mean() < 0.5 and visible[:20].mean() > 0.9


def test_a_warping_error_counts_where_the_next_frame_shows_the_pixel(video):
    """In the whole frame and in the hole: flicker of the left part only, which a pan takes out of the frame."""
    frames, holes = moving_video(2, 80, 100, pan=8)
    holes[:] = 0
    holes[:, 20:60, :40] = 255
    result = frames.copy()
    result[0, :, :7] = 255 - result[0, :, :7]
    found, clean = (Reference(frames, holes).score(clip) for clip in (result, frames))
    for name in ("warp", "warp_hole"):
        assert found[name] == pytest.approx(clean[name], rel=1e-6)


def test_ssim_by_its_definition():
    """One window that fills the frame: the formula of Wang et al., with the sample covariances scikit-image takes."""
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 256, (7, 7, 1)).astype(np.uint8).repeat(3, axis=2) for _ in range(2))
    x, y = a[..., 0].astype(float).ravel(), b[..., 0].astype(float).ravel()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    (xx, xy), (_, yy) = np.cov(x, y)
    expected = (2 * x.mean() * y.mean() + c1) * (2 * xy + c2)
    expected /= (x.mean() ** 2 + y.mean() ** 2 + c1) * (xx + yy + c2)
    assert ssim(a, b)[0] == pytest.approx(expected, abs=1e-9)


def test_the_truth_gets_the_ceiling(video):
    frames, holes = video
    found = Reference(frames, holes).score(frames)
    assert found["psnr"] == found["psnr_hole"] == np.inf and found["ssim"] == found["ssim_hole"] == 1
    assert psnr(frames[0], frames[0]) == np.inf


def test_warping_error_is_zero_at_rest_and_grows_with_flicker(video):
    still = np.repeat(video[0][:1], 5, axis=0)
    reference, errors = Reference(still, video[1]), []
    for flicker in (0, 2, 5, 15):
        offsets = np.random.default_rng(3).choice([-flicker, flicker], (5, 1, 1, 1))
        errors.append(reference.score(np.clip(still + offsets, 0, 255).astype(np.uint8)))
    for name in ("warp", "warp_hole"):
        values = [entry[name] for entry in errors]
        assert values[0] == 0 and sorted(values) == values and values[1] > 0 and values[3] > 10 * values[1]

    still = still.clip(max=200)
    result = still.copy()
    result[1::2] += 15
    errors = Reference(still, video[1]).score(result)
    assert [errors["warp"], errors["warp_hole"]] == pytest.approx([1000 * (15 / 255) ** 2] * 2)


def test_warping_follows_the_motion():
    """A pan of 3 pixels a frame: without the flow's help the frames differ far more."""
    frames, holes = moving_video(4, 80, 100, pan=3)
    found = Reference(frames, holes).score(frames)["warp"]
    unaligned = 1000 * np.mean(np.diff(frames.astype(float) / 255, axis=0) ** 2)
    assert found < 0.1 * unaligned


def test_frames_without_a_hole_do_not_count(video):
    frames, holes = video[0], video[1].copy()
    holes[2:] = 0
    result = 255 - frames
    reference = Reference(frames, holes)
    assert reference.scored_frames == 2
    assert reference.score(result)["psnr"] == pytest.approx(np.mean([psnr(frames[t], result[t]) for t in (0, 1)]))


def test_average_counts_frames():
    rows = [{"frames": n, **dict.fromkeys(Reference(*moving_video(1, 20, 20)).score(np.zeros((1, 20, 20, 3), np.uint8)),
            value)} for n, value in ((10, 1.0), (30, 2.0))]  # fmt: skip
    mean = average(rows)
    assert mean["frames"] == 40 and mean["psnr"] == pytest.approx(1.75)
    head, line = table({"step 5": mean})
    assert "PSNR hole" in head and line.split()[:4] == ["step", "5", "40", "1.75"]


def test_average_of_scores_of_which_some_are_missing():
    """TC and RC count videos, as published; a score that only some have is theirs, one that none has is left out."""
    rows = [{"frames": 10, "psnr": 1.0, "tc": 0.9, "rc_t": float("nan"), "lpips": 0.5},
            {"frames": 30, "psnr": 2.0, "tc": 0.8, "rc_t": 0.7, "lpips": ""}]  # fmt: skip
    assert average(rows) == pytest.approx({"frames": 40, "psnr": 1.75, "lpips": 0.5, "tc": 0.85, "rc_t": 0.7})
    head, _ = table({"step 5": average(rows)})
    assert head.split() == ["frames", "PSNR", "LPIPS", "TC", "RC-T"]


def test_the_pages_means_are_of_the_same_videos_at_every_step():
    """Step 1 had another second video, step 3 time for one more, step 4 no time for it."""
    found = {1: {"a": 10, "old": 50}, 2: {"a": 20, "b": 30}, 3: {"a": 12, "b": 32, "c": 90}, 4: {"a": 21, "b": 41}}
    rows = [{"step": step, "number": n, "video": video, "frames": 4, "psnr_hole": value}
            for step, videos in found.items() for n, (video, value) in enumerate(videos.items())]  # fmt: skip
    count, means = average_by_step(rows)
    assert (count, {step: row["psnr_hole"] for step, row in means.items()}) == (2, {2: 25, 3: 22, 4: 31})
    assert average_by_step([]) == (0, {})


@pytest.mark.parametrize("name", BASELINES)
def test_rivals_keep_known_pixels_and_never_look_into_the_hole(video, name):
    frames, holes = video
    filled = BASELINES[name](frames, holes)
    assert filled.dtype == np.uint8 and np.array_equal(filled[holes == 0], frames[holes == 0])
    painted = np.where(holes[..., None] > 0, 255 - frames, frames).astype(np.uint8)
    assert np.array_equal(BASELINES[name](painted, holes), filled)
    assert not np.array_equal(filled, frames)


def test_temporal_median_finds_what_other_frames_show():
    """A background at rest behind a moving hole is found exactly."""
    frames, holes = moving_video(5, 80, 100, pan=0, hole_speed=40)
    still = np.repeat(frames[:1], 5, axis=0)
    assert not (holes > 0).all(axis=0).any()
    assert np.array_equal(BASELINES["temporal-median"](still, holes), still)
