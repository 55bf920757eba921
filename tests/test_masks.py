"""Mask synthesis: polarity, motion, spans, and the original's measured distribution."""

import re
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

import dataset.holes as holes
from dataset.crop import Crop
from dataset.holes import Holes
from dataset.mask_kinds import KINDS, draw_kind, grow, parse_growth, parse_mix
from dataset.utils import create_random_shape_with_random_motion

HEIGHT, WIDTH, FRAMES = 480, 854, 10
# Quantiles (0, 5, 25, 50, 75, 95, 100 %) of 1,500 clips that the original's code drew at 854x480.
ORIGINAL = {
    "area": [0.0132, 0.0282, 0.0486, 0.0681, 0.0956, 0.1453, 0.2446],
    "height": [0.1292, 0.1979, 0.2771, 0.3667, 0.4609, 0.5771, 0.6896],
    "width": [0.1218, 0.192, 0.274, 0.3706, 0.4684, 0.5902, 0.6991],
    "fill": [0.2647, 0.4078, 0.4831, 0.536, 0.5918, 0.6704, 0.776],
    "step": [0.0, 0.0, 1.0, 2.0, 3.1623, 6.3246, 13.6015],
}


def draw(seed, **settings):
    masks = create_random_shape_with_random_motion(FRAMES, HEIGHT, WIDTH, rng=np.random.default_rng(seed), **settings)
    return [np.asarray(mask) for mask in masks]


def statistics(count, **settings):
    """Per clip: area and box shares of the first frame, displacements, and whether it stays."""
    found = {"area": [], "height": [], "width": [], "fill": [], "step": [], "static": []}
    for seed in range(count):
        masks = draw(seed, **settings)
        boxes = [cv2.boundingRect(mask) for mask in masks]
        _, _, w, h = boxes[0]
        area = np.count_nonzero(masks[0])
        found["area"].append(area / masks[0].size)
        found["height"].append(h / HEIGHT)
        found["width"].append(w / WIDTH)
        found["fill"].append(area / (w * h))
        found["static"].append(all(np.array_equal(mask, masks[0]) for mask in masks))
        if not found["static"][-1]:
            corners = np.array([box[:2] for box in boxes])
            found["step"] += list(np.linalg.norm(np.diff(corners, axis=0), axis=1))
    return found


def test_form():
    masks = create_random_shape_with_random_motion(4)
    assert len(masks) == 4
    assert {mask.mode for mask in masks} == {"L"} and {mask.size for mask in masks} == {(432, 240)}
    assert set(np.unique(masks[0])) == {0, 255}  # 255 = hole


def test_the_span_is_what_the_box_really_takes():
    found = statistics(250)
    for side in ("height", "width"):
        assert min(found[side]) > 1 / 3 - 0.01 and max(found[side]) <= 1
        assert np.mean(found[side]) == pytest.approx(2 / 3, abs=0.04)
    assert np.mean(found["static"]) == pytest.approx(0.5, abs=0.1)
    narrow = statistics(40, span=(0.2, 0.25))
    assert max(narrow["height"]) <= 0.26 and min(narrow["height"]) >= 0.19


def test_the_originals_setting_matches_its_measured_distribution():
    found = statistics(700, original_margins=True)
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    for name, quantiles in ORIGINAL.items():
        tolerance = 1.0 if name == "step" else 0.03
        measured = np.quantile(found[name], levels)
        assert np.abs(measured - quantiles[1:-1]).max() <= tolerance, (name, measured)
    assert np.mean(found["area"]) == pytest.approx(0.0751, abs=0.006)
    assert np.mean(found["static"]) == pytest.approx(0.5, abs=0.08)


def test_moving_masks_stay_inside_and_keep_their_shape():
    for seed in range(60):
        masks = draw(seed, span=(1 / 3, 0.6))
        areas = [np.count_nonzero(mask) for mask in masks]
        assert max(areas) == min(areas)  # whole-pixel moves, never cut off by the border


DRAWN = [kind for kind in KINDS if kind != "object"]
# Mean areas of the clips that a sheet was looked at with.
AREAS = {"blob": 0.236, "box": 0.18, "ellipse": 0.142, "stroke": 0.095, "text": 0.065, "several": 0.108}


def draw_many(kind, count=120, side=128, **settings):
    return [draw_kind(np.random.default_rng([5, seed]), kind, 6, side, side, **settings) for seed in range(count)]


@pytest.mark.parametrize("kind", DRAWN)
def test_kinds(kind):
    clips = draw_many(kind)
    assert all(clip.shape == (6, 128, 128) and set(np.unique(clip)) <= {0, 255} for clip in clips)
    assert np.mean([np.mean(clip > 0) for clip in clips]) == pytest.approx(AREAS[kind], abs=0.02)
    resting = np.mean([(clip == clip[0]).all() for clip in clips])
    assert resting == (1 if kind == "text" else pytest.approx(0.15 if kind == "several" else 0.5, abs=0.12))
    again = draw_kind(np.random.default_rng([5, 0]), kind, 6, 128, 128)
    assert np.array_equal(again, clips[0])


def share_at_the_border(clips):
    return np.mean([clip[:, [0, -1]].any() or clip[:, :, [0, -1]].any() for clip in clips])


@pytest.mark.parametrize("kind", ["blob", "box", "ellipse"])
def test_holes_leave_the_frame_only_where_told(kind):
    inside = draw_many(kind)
    for clip in inside:
        areas = [np.count_nonzero(hole) for hole in clip]
        assert max(areas) - min(areas) <= 0.02 * max(areas)  # the same shape in every frame: nothing is cut off
    leaving = draw_many(kind, leaves=True)
    assert share_at_the_border(leaving) > 0.4
    assert any(np.count_nonzero(clip[0]) != np.count_nonzero(clip[-1]) for clip in leaving)


def test_several_holes_leave_the_frame_where_told():
    assert (
        share_at_the_border(draw_many("several")) < 0.4 < 0.7 < share_at_the_border(draw_many("several", leaves=True))
    )


def test_blobs_that_leave_the_frame_keep_the_span(monkeypatch):
    spans = []
    monkeypatch.setattr(holes, "draw_kind", lambda *args: spans.append(args[-1]) or np.full((2, 64, 64), 255, np.uint8))
    for kind in ("blob", "box"):
        found = Holes(SimpleNamespace(mask_span=(0.3, 0.4), mask_border=1, mask_mix=f"{kind}=1"), [], ())
        found.draw(np.random.default_rng(0), None, Crop.of(64, 64, 64), SimpleNamespace(folder=None), [None] * 2, None)
    assert spans == [(0.3, 0.4), None]


def test_text_is_low_high_or_in_a_corner():
    rows = np.mean([(clip[0] > 0).any(axis=1) for clip in draw_many("text")], axis=0)
    assert rows[:4].max() < 0.1 and rows[96:].mean() > 2 * rows[40:80].mean()


def test_holes_grow_and_shrink():
    holes = np.zeros((2, 40, 40), np.uint8)
    holes[:, 10:20, 10:30] = 255
    assert [np.count_nonzero(hole) for hole in grow(holes, 3)] == [16 * 26] * 2
    assert [np.count_nonzero(hole) for hole in grow(holes, -3)] == [4 * 14] * 2
    assert grow(holes, 0) is holes


@pytest.mark.parametrize(("pixels", "expected"), [(1, 8 * 8), (-4, 6 * 6)])
def test_small_masks_of_a_videos_own_grow_too(pixels, expected):
    """They may be less than the hundredth of a clip that drawn holes are; shrinking is what may go too far."""
    holes = np.zeros((2, 100, 100), np.uint8)
    holes[:, 10:16, 10:16] = 255
    settings = SimpleNamespace(mask_growth=f"{pixels},{pixels}")
    found = Holes(settings, videos=[], excluded=()).grown(np.random.default_rng(0), holes)
    assert [np.count_nonzero(hole) for hole in found] == [expected] * 2


@pytest.mark.parametrize(
    ("parse", "text", "reason"),
    [
        (parse_mix, "blob=0.5,box=0.4", "make 0.9"),
        (parse_mix, "star=1", "not 'star': blob, box"),
        (parse_mix, "blob", "blob=0.4"),
        (parse_mix, "blob=1.5,box=-0.5", "make 1"),
        (parse_mix, "blob=nan", "make nan"),
        (parse_mix, "", "kinds of holes"),
        (parse_growth, "5", "-8,16"),
        (parse_growth, "9,3", "least <= most"),
        (parse_growth, "0,1000", "256"),
    ],
)
def test_bad_mixes(parse, text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse(text)
