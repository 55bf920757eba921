"""Mask synthesis: one random closed shape per clip, at rest or moving.

Coordinates are pixels of the source frame, (x, y). In the masks made here 255 (or True) = hole, 0 = keep; the training
tensors turn that round (1 = keep).
"""

import argparse

import cv2
import numpy as np
from PIL import Image

# No OpenCV threads: its pool does not survive the fork into loader workers, which would then hang in their first
# resize if this process had used OpenCV before. Workers are the parallelism here.
cv2.setNumThreads(0)

FULL_SPAN = (1 / 3, 1.0)
MASK_SPAN_HELP = (
    "share of each side of the frame that a mask's box takes; 'original': the original code's smaller masks"
)
SUBPIXEL_BITS = 4  # cv2 takes fixed-point coordinates

# The original drew its shape with matplotlib and then scaled the whole picture, margins included, to the region: the
# axes took 77.5 % x 77 % of it (matplotlib's default margins), and their limits were 1.1 times the control points'.
ORIGINAL_AXES = np.array([0.775, 0.77])
ORIGINAL_AXES_ORIGIN = np.array([0.125, 0.12])
ORIGINAL_LIMITS = 1.1


def create_random_shape_with_random_motion(
    video_length, imageHeight=240, imageWidth=432, span=FULL_SPAN, original_margins=False, rng=None
):
    """Draw one random shape, moving over `video_length` frames half the time.

    Args:
        video_length: number of frames.
        imageHeight, imageWidth: frame size in pixels.
        span: smallest and largest share of each side of the frame that the shape's box takes.
        original_margins: lose a part of that share to margins, as the original's code does.
        rng: numpy Generator; None: a fresh one.

    Returns: list of PIL "L" images, 255 = hole, 0 = keep.
    """
    rng = np.random.default_rng() if rng is None else rng
    outlines = random_outlines(rng, video_length, imageHeight, imageWidth, span, original_margins)
    return [Image.fromarray(fill(outline, imageHeight, imageWidth)) for outline in outlines]


def random_outlines(rng, video_length, height, width, span=FULL_SPAN, original_margins=False):
    """Outline of one random shape in every frame: (video_length, points, 2), x and y in pixels."""
    region = np.array([width, height]) * rng.uniform(*span, size=2)
    outline = random_shape(rng, original_margins) * (region - 1)
    positions = random_positions(rng, video_length, room=np.array([width, height]) - region)
    return outline + positions[:, None]


def random_shape(rng, original_margins=False, points_per_corner=16):
    """A closed curve of 6-8 cubic Bezier corners in the unit square: (points, 2).

    The control points lie on a circle, each radius perturbed by a ratio of 0.6-0.8; the curve may cross itself.
    """
    corners = rng.integers(6, 9)
    ratio = rng.uniform(0.6, 0.8)
    angles = np.linspace(0, 2 * np.pi, 3 * corners + 1)
    radii = rng.uniform(1 - ratio, 1 + ratio, size=angles.size)
    radii[-1] = radii[0]  # closed
    control = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]

    t = np.arange(points_per_corner)[:, None, None] / points_per_corner
    p0, p1, p2, p3 = control[:-1:3], control[1::3], control[2::3], control[3::3]
    curve = (1 - t) ** 3 * p0 + 3 * (1 - t) ** 2 * t * p1 + 3 * (1 - t) * t**2 * p2 + t**3 * p3
    curve = curve.transpose(1, 0, 2).reshape(-1, 2)
    if original_margins:
        low, high = ORIGINAL_LIMITS * control.min(), ORIGINAL_LIMITS * control.max()
        return ORIGINAL_AXES_ORIGIN + ORIGINAL_AXES * (curve - low) / (high - low)
    low, high = curve.min(axis=0), curve.max(axis=0)
    return (curve - low) / (high - low)


def random_positions(rng, video_length, room):
    """Top-left corner of the shape's region in every frame, (video_length, 2), each within [0, room].

    Half the time it stays where it is. Otherwise it starts with 1-3 px/frame in a random direction; per frame its speed
    changes by N(0, 1.5) px and its direction by N(0, 0.25) rad; at the border it takes a new random velocity.
    """
    room = np.floor(room)
    position = np.floor(rng.uniform(0, room + 1))
    if rng.random() < 0.5:
        return np.tile(position, (video_length, 1))
    speed, angle = rng.uniform(1, 3), rng.uniform(0, 2 * np.pi)
    positions = [position]
    for _ in range(video_length - 1):
        moved = position + np.trunc(speed * np.array([np.cos(angle), np.sin(angle)]))
        position = np.clip(moved, 0, room)
        if (position == moved).all():
            speed, angle = speed + rng.normal(0, 1.5), angle + rng.normal(0, 0.25)
        else:
            speed, angle = abs(rng.normal(0, 1.5)), rng.uniform(0, 2 * np.pi)
        positions.append(position)
    return np.array(positions)


def fill(outline, height, width):
    """uint8 (height, width) with 255 inside `outline`, (points, 2) in pixels, and 0 elsewhere."""
    mask = np.zeros((height, width), np.uint8)
    points = np.round(outline * 2**SUBPIXEL_BITS).astype(np.int32)
    return cv2.fillPoly(mask, [points], 255, shift=SUBPIXEL_BITS)


def draw_holes(length, height, width, args, number):
    """(length, height, width) uint8, 255 = hole: the training's masks, by seed and number."""
    rng = np.random.default_rng([args.seed, number])
    outlines = random_outlines(rng, length, height, width, args.mask_span, args.mask_original_margins)
    return np.stack([fill(outline, height, width) for outline in outlines])


def mask_span(text):
    """'0.33,1' as two shares of a frame's side, or 'original' for the original's margins."""
    if text == "original":
        return text
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'original' or two numbers such as 0.33,1 were needed, not {text!r}"
        ) from None
    if not 0 < low <= high <= 1:
        raise argparse.ArgumentTypeError(f"0 < smallest <= largest <= 1 was needed, not {text!r}")
    return low, high


def split_mask_span(args):
    """args.mask_span as two shares, args.mask_original_margins as a bool."""
    args.mask_original_margins = args.mask_span == "original"
    if args.mask_original_margins:
        args.mask_span = FULL_SPAN
