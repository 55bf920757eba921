"""The plain ways to fill a hole that any user would try first; a model has to beat them.

Each takes frames (f, h, w, 3) uint8 RGB and holes (f, h, w) uint8, non-zero = hole, never looks at what is in the hole,
and returns the filled frames; known pixels stay.
"""

from functools import partial

import cv2
import numpy as np

from common.threads import in_threads

RADIUS = 5  # pixels around a hole's border that OpenCV's methods look at
ROWS = 32  # of the whole video whose median is taken at a time: memory stays small


def telea(frames, holes):
    """https://doi.org/10.1080/10867651.2004.10487596"""
    return np.stack(list(in_threads(inpaint_frame, frames, holes)))


def navier_stokes(frames, holes):
    """https://doi.org/10.1109/CVPR.2001.990497"""
    method = partial(inpaint_frame, method=cv2.INPAINT_NS)
    return np.stack(list(in_threads(method, frames, holes)))


def inpaint_frame(frame, hole, method=cv2.INPAINT_TELEA):
    """A frame (h, w, 3) uint8 with its hole (h, w), non-zero = hole, filled by OpenCV."""
    known = np.where(hole[..., None] > 0, 0, frame).astype(np.uint8)
    return cv2.inpaint(known, (hole > 0).astype(np.uint8), RADIUS, method)


def temporal_median(frames, holes):
    """Every pixel's median over the frames that show it; Telea where none does."""
    plate, never_seen = median_plate(frames, holes)
    return np.stack([with_plate(frame, hole, plate, never_seen) for frame, hole in zip(frames, holes, strict=True)])


def median_plate(frames, holes):
    """(every pixel's median over the frames that show it (h, w, 3) uint8, where none does (h, w))."""
    plate, never_seen = np.zeros_like(frames[0]), (holes > 0).all(axis=0)
    for top in range(0, len(plate), ROWS):
        rows = slice(top, top + ROWS)
        known = np.where(holes[:, rows, :, None] > 0, np.nan, frames[:, rows].astype(np.float32))
        known[:, never_seen[rows]] = 0  # filled by Telea
        plate[rows] = np.nanmedian(known, axis=0).round()
    return plate, never_seen


def with_plate(frame, hole, plate, never_seen):
    """A frame (h, w, 3) with the plate in its hole (h, w), and Telea where the plate shows nothing."""
    filled = np.where(hole[..., None] > 0, plate, frame)
    unknown = never_seen & (hole > 0)
    return inpaint_frame(filled, unknown) if unknown.any() else filled


def mean_colour(frames, holes):
    """The mean of the frame's known pixels."""
    filled = frames.copy()
    for frame, hole in zip(filled, holes > 0, strict=True):
        frame[hole] = frame[~hole].mean(axis=0).round() if not hole.all() else 127
    return filled


BASELINES = {
    "telea": telea,
    "navier-stokes": navier_stokes,
    "temporal-median": temporal_median,
    "mean-colour": mean_colour,
}
