"""Kinds of holes, the default shape (blob) and others, and how a mix of them is drawn.

Coordinates are pixels of the crop, (x, y); in the masks made here 255 = hole, 0 = keep. Everything follows from the rng
that is passed in. Kinds in use elsewhere: free-form strokes (https://arxiv.org/abs/1806.03589), boxes, ellipses and
brushes (https://arxiv.org/abs/2503.05639), shapes of other videos' objects (https://arxiv.org/abs/2501.00740).
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from dataset.utils import FULL_SPAN, SUBPIXEL_BITS, random_positions, random_shape

DEFAULT_MIX, NO_GROWTH = "blob=1", "0,0"
SEVERAL_SPAN = (0.1, 0.35)


@dataclass(frozen=True)
class Shape:
    """A rigid hole: closed curves to fill, or open ones `width` pixels wide; (points, 2) each, from (0, 0) on."""

    curves: list
    size: np.ndarray  # (x, y) of the box that holds it
    width: float = 0.0

    def draw(self, mask, position):
        """Add it to `mask`, its box's top-left corner at `position`."""
        curves = [np.round((curve + position) * 2**SUBPIXEL_BITS).astype(np.int32) for curve in self.curves]
        if self.width:
            cv2.polylines(mask, curves, False, 255, max(1, round(self.width)), shift=SUBPIXEL_BITS)
        for curve in () if self.width else curves:  # one by one: where curves overlap, both are hole
            cv2.fillPoly(mask, [curve], 255, shift=SUBPIXEL_BITS)


def blob(rng, size):
    """The default shape: a closed curve of cubic Bezier corners."""
    return Shape([random_shape(rng) * (size - 1)], size)


def box(rng, size):
    return Shape([np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * (size - 1)], size)


def ellipse(rng, size):
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return Shape([(np.stack([np.cos(angles), np.sin(angles)], axis=1) + 1) / 2 * (size - 1)], size)


def stroke(rng, size):
    """A brush's path: 5-12 points, each going on in about the direction of the one before, then fitted to its box."""
    turns = rng.normal(0, 0.8, rng.integers(4, 12))
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(turns)
    steps = rng.uniform(0.3, 1, turns.size)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    width = rng.uniform(0.15, 0.4) * size.min()
    low, high = path.min(axis=0), path.max(axis=0)
    return Shape([(path - low) / np.maximum(high - low, 1e-6) * (size - width) + width / 2], size, width)


def text(rng, frame):
    """(Shape, position): one or two lines of words as subtitles have them, or a logo in a corner."""
    if rng.random() < 0.3:
        size = frame * rng.uniform((0.1, 0.06), (0.3, 0.18))
        margin = frame * rng.uniform(0.02, 0.06)
        corner = rng.integers(0, 2, 2)
        return rng.choice([box, ellipse])(rng, size), margin + corner * (frame - size - 2 * margin)
    line = frame[1] * rng.uniform(0.05, 0.1)
    length = frame[0] * rng.uniform(0.4, 0.95)
    words = []
    for row in range(rng.integers(1, 3)):
        right = length * rng.uniform(0.6, 1)
        x = (length - right) / 2  # centred
        right += x
        while x < right:
            end = min(right, x + line * rng.uniform(0.8, 4))
            top, bottom = row * 1.4 * line, (row * 1.4 + 1) * line
            words.append(np.array([(x, top), (end, top), (end, bottom), (x, bottom)]))
            x = end + 0.35 * line
    size = np.array([length, words[-1][:, 1].max()])
    top = rng.uniform(0.7, 0.95) if rng.random() < 0.8 else rng.uniform(0.03, 0.15)
    return Shape(words, size), np.array([(frame[0] - length) / 2, min(top * frame[1], frame[1] - size[1])])


# Kinds with a box: how they are drawn into it, and the smallest and largest share of the frame's sides that it takes.
SHAPES = {"blob": (blob, FULL_SPAN), "box": (box, (0.15, 0.7)), "ellipse": (ellipse, (0.15, 0.7)),
          "stroke": (stroke, (0.2, 0.8))}  # fmt: skip
KINDS = (*SHAPES, "text", "several", "object")
MIX_HELP = f"kinds of holes, and the share of clips that has each: {', '.join(KINDS)}"


def draw_kind(rng, kind, length, height, width, leaves=False, span=None):
    """(length, height, width) uint8, 255 = hole: one hole of a kind, at rest or moving as the default shape does.

    Args:
        kind: one of KINDS except "object", which needs annotations.
        leaves: the hole, unless it is text, may touch the frame's border and be up to half outside.
        span: smallest and largest share of the frame's sides that its box takes; None: the kind's own.
    """
    masks = np.zeros((length, height, width), np.uint8)
    if kind == "several":
        for _ in range(rng.integers(2, 5)):
            part = rng.choice(list(SHAPES))
            np.maximum(masks, draw_kind(rng, part, length, height, width, leaves, SEVERAL_SPAN), out=masks)
        return masks
    frame = np.array([width, height])
    if kind == "text":
        shape, position = text(rng, frame)
        positions = np.tile(position, (length, 1))  # subtitles and logos rest
    else:
        draw_shape, own_span = SHAPES[kind]
        shape = draw_shape(rng, frame * rng.uniform(*(span or own_span), size=2))
        positions = place(rng, length, frame, shape.size, leaves)
    for mask, position in zip(masks, positions, strict=True):
        shape.draw(mask, position)
    return masks


def place(rng, length, frame, size, leaves):
    """Top-left corners (length, 2) of a box of `size`, inside a frame or up to half outside."""
    outside = size / 2 if leaves else np.zeros(2)
    return random_positions(rng, length, room=np.maximum(0, frame - size) + 2 * outside) - outside


def grow(masks, pixels):
    """Masks (f, h, w) dilated by a square of `pixels` to each side, or eroded where that is negative."""
    if not pixels:
        return masks
    kernel = np.ones((2 * abs(pixels) + 1,) * 2, np.uint8)
    change = cv2.dilate if pixels > 0 else cv2.erode
    return np.stack([change(mask, kernel) for mask in masks])


def parse_mix(text):
    """'blob=0.4,box=0.6' as {"blob": 0.4, "box": 0.6}. Raises ValueError with what was needed."""
    mix = {}
    for part in text.split(","):
        kind, _, share = part.strip().partition("=")
        if kind not in KINDS:
            raise ValueError(f"kinds of holes were needed, not {kind!r}: {', '.join(KINDS)}")
        try:
            mix[kind] = mix.get(kind, 0) + float(share)
        except ValueError:
            raise ValueError(f"a share such as {kind}=0.4 was needed") from None
    total = math.fsum(mix.values())
    if not all(0 <= share <= 1 for share in mix.values()) or not math.isclose(total, 1, abs_tol=1e-3):
        raise ValueError(f"shares that make 1 were needed, these make {total:g}")
    return mix


def parse_growth(text):
    """'-8,16' as the least and the most pixels to each side. Raises ValueError with what was needed."""
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError("two whole numbers such as -8,16 were needed") from None
    if not -256 <= low <= high <= 256:
        raise ValueError("-256 <= least <= most <= 256 was needed")
    return low, high
