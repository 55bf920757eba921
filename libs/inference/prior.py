"""A prior: a rough fill of the holes that sampling starts from, where DiffuEraser takes ProPainter's result."""

import os
from pathlib import Path

import numpy as np

from common.errors import InputError
from dataset.images import image_size, list_frames, read_frames
from libs.evaluation.baselines import inpaint_frame, median_plate, with_plate
from libs.inference.composition import resize_picture
from libs.inference.streams import Mapped, pick

ON_THE_SPOT = ("telea", "median", "none")  # what --prior takes besides a path
MEDIAN_FRAMES = 100  # of a clip, spread over it, that a median is taken of: 123 MB at 854x480


def read_prior(name, folder, paths, shape, size=None):
    """The video in `folder`, whose frames lie at `paths`, as another method filled it, scaled to `shape`, (h, w):
    (f, h, w, 3) uint8; None where `name` is one of ON_THE_SPOT. Raises InputError as `check_prior` does, and where a
    frame cannot be read."""
    if name in ON_THE_SPOT:
        return None
    check_prior(name, folder, paths, size)
    frames = read_frames(list_frames(Path(name, folder.name))[: len(paths)])
    return np.stack([resize_picture(frame, *shape) for frame in frames])


def check_prior(name, folder, paths, size=None):
    """Raises InputError where --prior is a path, but no folder of as many frames of a video's size, or of `size`, a
    text such as 432x240; `paths` may be the video's first frames, which will do then."""
    if name in ON_THE_SPOT:
        return
    prior = Path(name, folder.name)
    if os.path.realpath(prior) == os.path.realpath(folder):
        raise InputError(f"--prior={name} holds the videos themselves: what another method made of them was needed")
    found = list_frames(prior) if prior.is_dir() else ()
    if not len(paths) <= len(found) <= len(list_frames(folder)):
        raise InputError(f"{prior} holds {len(found)} frames, {folder} {len(paths)}: --prior needs a folder of as many "
                         f"frames for every video, or one of {', '.join(ON_THE_SPOT)}")  # fmt: skip
    sizes = [image_size(pictures[0]) for pictures in (found, paths)]
    if sizes[0] not in (sizes[1], size):
        raise InputError(f"{prior} is {sizes[0]}, {folder} is {sizes[1]}: --prior needs frames of the video's size")


def make_prior(name, frames, holes):
    """A stream of filled frames, made when read, of streams of frames and holes; None for "none".

    telea: each frame for itself. median: each pixel's median over up to 100 frames of the clip that show it, which is
    its true background where a mask moves and the camera stands.
    """
    if name == "none":
        return None
    if name == "telea":
        return Mapped(inpaint_frame, frames, holes)
    count = min(len(frames), MEDIAN_FRAMES)
    numbers = [i * len(frames) // count for i in range(count)]
    plate, never_seen = median_plate(pick(frames, numbers), pick(holes, numbers))
    return Mapped(lambda frame, hole: with_plate(frame, hole, plate, never_seen), frames, holes)
