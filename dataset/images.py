"""Reading frames and masks, listing a folder's pictures, and pairing the two by name."""

import os
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from common.command_line import require
from common.errors import InputError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
LOSSY_THRESHOLD = 127  # of masks in videos and JPEGs, whose zeros are no zeros any more


class BrokenFrame(InputError):
    """A frame that is no whole image of its video's size."""


def read_frame(path):
    """(h, w, 3) uint8, RGB. Raises BrokenFrame for whatever is no whole image."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BrokenFrame(f"{path} cannot be read ({error.strerror})") from None
    if not content:
        raise BrokenFrame(f"{path} is empty")
    if content.startswith(b"version https://git-lfs"):
        raise BrokenFrame(f"{path} is a Git LFS pointer, not an image: run git lfs pull")
    if content.startswith(b"\xff\xd8") and not has_end_marker(content):  # OpenCV would fill the rest with grey
        raise BrokenFrame(f"{path} is cut short ({len(content)} bytes)")
    frame = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    if frame is None:
        raise BrokenFrame(f"{path} is no readable image ({len(content)} bytes)")
    return frame


def has_end_marker(jpeg):
    """Whether a JPEG's picture is whole, whatever follows it: cameras append previews, videos and data of their own.

    The marker is looked for behind the leading segments, one of which may hold a thumbnail with a marker of its own;
    in the picture's data it cannot occur by chance, as an ff there is followed by 00 or a restart marker.
    """
    place = 2
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] != b"\xda":  # start of the picture's data
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return jpeg.find(b"\xff\xd9", place) >= 0


def read_frames(paths):
    """Frames of one size."""
    frames = [read_frame(path) for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        if frame.shape != frames[0].shape:
            raise BrokenFrame(f"{path} is {size_of(frame)}, {paths[0].name} is {size_of(frames[0])}")
    return frames


def size_of(frame):
    return f"{frame.shape[1]}x{frame.shape[0]}"


def list_frames(folder):
    """A folder's images in the order of their names; hidden files, which macOS adds to what it packs, are none.

    Raises: BrokenFrame where two have one name, such as a frame and its mask.
    """
    names = sorted(os.listdir(folder))
    paths = tuple(Path(folder, n) for n in names if n.lower().endswith(FRAME_SUFFIXES) and not n.startswith("."))
    for path, following in pairwise(paths):
        if path.stem == following.stem:
            raise BrokenFrame(f"{folder} holds {path.name} and {following.name}: one picture per frame was needed")
    return paths


def read_mask(path):
    """(h, w) uint8, 255 = hole: where any colour is above the threshold and not transparent. In palettes
    "0 = background" is black."""
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise InputError(f"{path} is no readable image: a mask was needed")
    if mask.ndim == 3:
        mask = np.where(mask[..., 3] > 0, mask[..., :3].max(axis=-1), 0) if mask.shape[2] == 4 else mask.max(axis=-1)
    return binary(mask, 0 if Path(path).suffix.lower() == ".png" else LOSSY_THRESHOLD)


def binary(mask, threshold):
    return np.where(mask > threshold, 255, 0).astype(np.uint8)


def pair_by_name(images, masks, flags=("--validation_image", "--validation_mask")):
    """[(frame path, mask path)] of a video, in the frames' order; every frame needs a mask of its name."""
    for folder, flag, content in zip((images, masks), flags, ("frames", "masks"), strict=True):
        require(Path(folder).is_dir(), f"{folder} is no folder: {flag} needs folders of {content}")
    require(
        Path(images).resolve() != Path(masks).resolve(),
        f"{masks} is the frames' own folder: {flags[1]} needs folders of masks",
    )
    frames = list_frames(images)
    require(frames, f"{images} holds no frames: {flags[0]} needs folders of .jpg or .png files")
    by_name = {path.stem: path for path in list_frames(masks)}
    missing = [path.name for path in frames if path.stem not in by_name]
    if missing:
        raise InputError(
            f"{masks} has no mask for {len(missing)} of the {len(frames)} frames in {images}, such as {missing[0]}: "
            f"{flags[1]} needs a mask of every frame's name"
        )
    return [(path, by_name[path.stem]) for path in frames]
