"""Clips and their masks, from files of any kind, and what is done to their frames."""

from functools import reduce
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from common.errors import InputError
from common.files import written_whole
from common.threads import in_threads
from dataset.images import (
    FRAME_SUFFIXES,
    KINDS,
    UNREADABLE,
    describe_content,
    find_hole,
    list_frames,
    pillow,
    read_frame,
    read_mask_values,
    size_of,
)  # fmt: skip
from libs.inference.composition import resize_picture
from libs.inference.video_file import VideoFile

GIF_FPS = 8
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


class Pictures:
    """A folder of frames, or one image, read anew in every pass: what VideoFile is for videos, without times."""

    fps, has_audio = None, False

    def __init__(self, path):
        """Raises: InputError where one of them cannot be read, or is of another size."""
        self.path, self.paths = path, list_pictures(path, "frames")
        first = None
        for file, frame in zip(self.paths, self.frames(), strict=True):
            first = check_size(path, file.name, frame, first)
        self.height, self.width = first[1].shape[:2]

    def __len__(self):
        return len(self.paths)

    def frames(self):
        """(height, width, 3) uint8 RGB, one after the other."""
        return in_threads(read_frame, self.paths)


class Masks:
    """Masks of one size, read anew in every pass, from a folder, a single image, or a video.

    Attributes: height, width; shares, the hole's share of every mask; note, what is worth saying of masks that are not
    two-valued, or "". See `dataset.images.find_hole`.

    Raises: InputError as `open_video` does.
    """

    def __init__(self, path):
        self.path, path = path, Path(path)
        self.video = None if path.is_dir() or is_image(path) else open_video(path)
        self.paths = () if self.video else list_pictures(path, "masks")
        self.shares, self.note, first = [], "", None
        for name, hole, note in self.holes():
            first = check_size(path, name, hole, first)
            self.shares.append(float(np.count_nonzero(hole) / hole.size))
            if note and not self.note:
                self.note = f"{name} has {note}"
        self.height, self.width = first[1].shape

    def __len__(self):
        return len(self.shares)

    def holes(self):
        """(name, hole (height, width), note) of every mask."""
        if self.video:
            frames = self.video.frames("rgba")
            return in_threads(lambda frame: (self.path, *find_hole(brightest(frame), False)), frames)
        return in_threads(lambda file: (file.name, *find_hole(*read_mask_values(file))), self.paths)

    def frames(self, count=None):
        """(height, width) uint8, 255 = hole; one for all frames `count` times."""
        holes = (hole for _, hole, _ in self.holes())
        if len(self) > 1 or not count:
            return holes
        hole = next(holes)
        return (hole for _ in range(count))

    def describe(self):
        return describe_holes(self.shares, self.note)


def brightest(frame):
    """(h, w) uint8: the brightest channel of (h, w, 4) RGBA; transparent pixels are 0."""
    *colours, alpha = cv2.split(frame)
    return np.where(alpha > 0, reduce(cv2.max, colours), 0)


def describe_holes(shares, note):
    """Such as "hole 12.3 % of the picture (8.1 to 14.0)"."""
    spread = f" ({100 * min(shares):.1f} to {100 * max(shares):.1f})" if len(shares) > 1 else ""
    return f"hole {100 * np.mean(shares):.1f} % of the picture{spread}" + (f"; {note}" if note else "")


def open_video(path):
    """VideoFile or Pictures of a video file, a folder of frames, or an image: len(), height, width, fps, frames().

    Raises: InputError where nothing can be read, or frames differ in size.
    """
    path = Path(path)
    if path.is_dir() or is_image(path):
        return Pictures(path)
    if not path.is_file():
        found = "is neither a file nor a folder" if path.exists() else "does not exist"  # a pipe is read but once
        raise InputError(f"{path} {found}: a video file or a folder of frames was needed")
    return VideoFile(path)


def list_pictures(path, what):
    """The files of a folder, or of a single image."""
    if not path.is_dir():
        refuse_animation(path)
        return (path,)
    paths = list_frames(path)
    if not paths:
        raise InputError(f"{path} holds no {what} but {describe_content(path)}: {KINDS}, or a video file, were needed")
    return paths


def is_image(path):
    return path.suffix.lower() in FRAME_SUFFIXES and path.is_file()


def refuse_animation(path):
    """An image file of several pictures, of which OpenCV would read the first."""
    try:
        with pillow(path) as image:
            count = getattr(image, "n_frames", 1) if image.format in ("WEBP", "PNG", "TIFF") else 1
    except (*UNREADABLE, Image.DecompressionBombError):
        return  # reading it says why
    if count > 1:
        raise InputError(f"{path} holds {count} pictures: one, a video file, or a folder of frames was needed")


def check_size(where, name, image, first):
    """(name, image) of the first; raises InputError where another one's size differs."""
    if first and image.shape[:2] != first[1].shape[:2]:
        raise InputError(f"{where}: {name} is {size_of(image)}, {first[0]} is {size_of(first[1])}: one size was needed")
    return first or (name, image)


def stack(named_frames, where):
    """[(name, frame (h, w, ...))] as one array (f, h, w, ...). Raises InputError where they differ in size."""
    for name, frame in named_frames:
        check_size(where, name, frame, named_frames[0])
    return np.stack([frame for _, frame in named_frames])


def dilate(holes, iterations):
    """(f, h, w) holes grown by a 3x3 cross, so that an object's rim does not show."""
    return np.stack([cv2.dilate(hole, CROSS, iterations=iterations) for hole in holes]) if iterations else holes


def resize(frames, holes, height, width):
    """Frames (f, h, w, 3) and holes (f, h, w) at another size; arrays that have it come back as they are."""
    if holes.shape[1:] == (height, width):
        return frames, holes
    return tuple(np.stack([resize_picture(picture, height, width) for picture in clip]) for clip in (frames, holes))


def write_gif(path, frames):
    """Write (f, h, w, 3) uint8 frames as a looping GIF of 8 fps; renamed when whole, as a report may look on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The octree's 256 colours take 10 ms a frame; Pillow's default, a little truer, takes 0.3 s.
    pictures = [Image.fromarray(frame).quantize(method=Image.Quantize.FASTOCTREE) for frame in frames]
    with written_whole(path) as partial:
        pictures[0].save(partial, "GIF", save_all=True, append_images=pictures[1:], duration=1000 / GIF_FPS, loop=0)


def write_image(path, image):
    """(h, w, 3) uint8 RGB as a lossless PNG. Raises InputError where it cannot be written."""
    try:
        path.write_bytes(cv2.imencode(".png", image[..., ::-1])[1])
    except OSError as error:
        raise InputError(
            f"{path} could not be written ({error.strerror}): free some space, or see who may write there"
        ) from None
