"""Mask synthesis: polarity, motion, spans, and the original's measured distribution."""

import cv2
import numpy as np
import pytest

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
