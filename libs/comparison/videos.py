"""The videos of an evaluation: which there are, and what is shown, hidden and true in each.

Frames are (f, h, w, 3) uint8 RGB; holes (f, h, w) uint8, 255 = hole. A reader takes (the video's folder, its number in
the list, a seed, the flags) and returns a Clip; it raises InputError for what cannot be read or means nothing.
"""

import io
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from common.command_line import require
from common.errors import InputError
from dataset.folders import list_folders, read_names
from dataset.images import (
    KINDS,
    UNREADABLE,
    BrokenFrame,
    describe_content,
    find_hole,
    list_frames,
    pair_by_name,
    read_bytes,
    read_frames,
    read_mask_values,
)
from dataset.objects import AnnotatedVideo, Objects, paste_object
from dataset.pairs import FOLDERS, read_window, scan_pair
from dataset.utils import draw_holes
from libs.evaluation.metrics import SMALLEST_FLOW
from libs.inference.composition import MASK_DILATIONS
from libs.inference.video import dilate, resize, stack

MOST_DRAWS = 20  # of an object and its track, before none is seen
LEAST_HOLE = 0.005  # share of the clip's pixels that a pasted object's hole has to have


class Clip(NamedTuple):
    shown: np.ndarray  # what a method sees around the hole
    holes: np.ndarray
    truth: np.ndarray | None  # what should come out; None: nobody knows
    note: str = ""  # what is worth saying of its masks


def find_videos(args, holder=None):
    """The folders of frames to score, in the order of their names; of those that `holder`, another folder, has too."""
    root = Path(args.frames)
    if not root.is_dir():
        raise InputError(f"{root} is no folder: --frames needs a folder with a folder of frames per video")
    if args.videos:
        names = [name for entry in args.videos for name in named_videos(entry, root)]
        folders = [root / name for name in dict.fromkeys(names)]
    else:
        folders = [root / folder.name for folder in list_folders(holder or root)]
    require(folders, f"{holder or root} holds no folders but {describe_content(holder or root)}: "
                     f"{'--masks' if holder else '--frames'} needs a folder per video")  # fmt: skip
    for folder in folders:
        require(folder.is_dir(), f"{folder} is no folder: check --frames and --videos")
    names = [folder.name for folder in folders]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(not twice, f"two videos are called {twice}: --videos needs one name for each")
    return folders


def named_videos(entry, root):
    """The names in a text file; or the entry itself."""
    return read_names(entry, root) if entry.endswith(".txt") and Path(entry).is_file() else [entry]


def require_frames(folder):
    require(list_frames(folder), f"{folder} holds {describe_content(folder)}: {KINDS} were needed; check --frames")


def check_restoration(args, folders):
    """What can be told wrong without reading a picture, before hours are spent on the first video."""
    for folder in folders:
        require_frames(folder)
        if args.masks:
            pair_by_name(folder, Path(args.masks, folder.name), ("--frames", "--masks"))


def read_restoration(folder, number, seed, args):
    """Known content under the video's own masks, or under a synthetic hole that follows from seed and number."""
    if args.masks:
        frames, holes, note = read_masked(folder, args)
    else:
        frames = np.stack(read_frames(list_frames(folder)))
        holes, note = draw_holes(*frames.shape[:3], Namespace(**{**vars(args), "seed": seed}), number), ""
    frames, holes = fit(folder, frames, holes, args)
    return Clip(frames, holes, frames, note)


def read_removal(folder, number, seed, args):
    """An object to remove, marked by its annotation, which grows: nobody knows what is behind it."""
    frames, holes, note = read_masked(folder, args)
    frames, holes = fit(folder, frames, dilate(holes, MASK_DILATIONS), args)
    return Clip(frames, holes, None, note)


def read_masked(folder, args):
    """(frames, holes, note) of a video whose masks have its frames' names and size."""
    masks = Path(args.masks, folder.name)
    pairs = pair_by_name(folder, masks, ("--frames", "--masks"))
    frames = np.stack(read_frames([frame for frame, _ in pairs]))
    holes, note = read_holes([mask for _, mask in pairs], masks)
    if holes.shape != frames.shape[:3]:
        raise InputError(f"{masks} and {folder} hold pictures of different sizes: masks of the frames' were needed")
    if not holes.any():
        raise InputError(f"{masks} marks nothing: any value above 0 is hole; mend them, or leave the video out")
    return frames, holes, note


def read_holes(paths, folder):
    """(holes (f, h, w), what is worth saying of the first mask that is not two-valued, or "") of masks in a folder."""
    found = [(path.name, *find_hole(*read_mask_values(path))) for path in paths]
    note = next((f"{name} has {note}" for name, _, note in found if note), "")
    return stack([(name, hole) for name, hole, _ in found], folder), note


def fit(folder, frames, holes, args):
    """Both in --size: frames by area, holes by nearest. Raises InputError for a size in which no hole is left."""
    width, height = args.size or (frames.shape[2], frames.shape[1])
    if min(width, height) < SMALLEST_FLOW:
        raise InputError(
            f"{folder} is {width}x{height}: {SMALLEST_FLOW}x{SMALLEST_FLOW} or more was needed; use --size"
        )
    fitted = resize(frames, holes, height, width)
    if holes.any() and not fitted[1].any():
        raise InputError(f"{folder} has no hole left at {width}x{height}: raise --size, or leave the video out")
    return fitted


def find_propainter(args):
    """A video for every folder of masks, in the order of their names."""
    return sorted(find_videos(args, Path(args.masks)), key=lambda folder: folder.name)


def check_propainter(args, folders):
    for folder in folders:
        require_frames(folder)
        for path in propainter_masks(args, folder):
            require(path.is_file(), f"{path} is missing: ProPainter's test masks have one for every frame of {folder}, "
                                    "named by its place from 00000.png on; check --masks and --frames")  # fmt: skip


def propainter_masks(args, folder):
    return [Path(args.masks, folder.name, f"{place:05d}.png") for place in range(len(list_frames(folder)))]


def read_propainter(folder, number, seed, args):
    """As core/dataset.py of https://github.com/sczhou/ProPainter reads its test sets: frames in the order of their
    names, scaled bilinearly (without averaging, with which plain methods have 0.02 to 0.28 dB more), masks by
    their place, scaled by Pillow's nearest, whatever is above 0, dilated 4 times by a cross of 3x3 pixels."""
    # "10" after "9", as a prior's frames are read: the published sets' names have leading zeros.
    given = read_frames(list_frames(folder))
    frames = [cv2.resize(frame, args.size, interpolation=cv2.INTER_LINEAR) for frame in given]
    holes = np.stack([read_test_mask(path, args.size) for path in propainter_masks(args, folder)])
    require(holes.any(), f"{Path(args.masks, folder.name)} marks nothing: any value above 0 is hole")
    frames = np.stack(frames)
    return Clip(frames, dilate(holes, 4), frames)


def read_test_mask(path, size):
    """(h, w) uint8, 255 = hole: what is above 0 in the grey values that Pillow makes of a file."""
    try:
        with Image.open(io.BytesIO(read_bytes(path))) as image:
            grey = image.resize(size, Image.Resampling.NEAREST).convert("L")
    except UNREADABLE as error:
        raise BrokenFrame(str(error) if isinstance(error, InputError) else f"{path} is no readable image") from None
    return np.where(np.asarray(grey) > 0, 255, 0).astype(np.uint8)


def check_pairs(args, folders):
    for folder in folders:
        scan_pair(folder)


def read_pair(folder, number, seed, args):
    """A video with an object, and the same without it; see dataset/pairs.py."""
    pair = scan_pair(folder)
    if pair.broken:
        raise BrokenFrame(pair.broken)
    truth, shown = (np.stack(frames) for frames in read_window(pair, range(len(pair.frames))))
    holes, note = read_holes(pair.masks, folder / FOLDERS[-1])
    truth, _ = fit(folder, truth, holes, args)
    shown, holes = fit(folder, shown, holes, args)
    return Clip(shown, holes, truth, note)


def check_pasted(args, folders):
    for folder in folders:
        require_frames(folder)
    annotated(args).check({folder.name for folder in folders}, with_frames=True)


def annotated(args):
    """The objects of all videos that --masks has annotations of."""
    return Objects([AnnotatedVideo(masks.name, masks, Path(args.frames, masks.name))
                    for masks in list_folders(args.masks) if Path(args.frames, masks.name).is_dir()])  # fmt: skip


def read_pasted(folder, number, seed, args):
    """A video into which an object of another one is pasted, half of the time with a shadow; see dataset/objects.py.
    The hole falls short of the object, fits it or goes beyond it. All of it follows from seed and number."""
    frames = np.stack(read_frames(list_frames(folder)))
    truth, _ = fit(folder, frames, np.zeros(frames.shape[:3], np.uint8), args)
    rng, objects = np.random.default_rng([seed, number]), annotated(args)
    for _ in range(MOST_DRAWS):
        track = objects.draw_track(rng, *truth.shape[:3], folder.name, with_frames=True)
        shown, holes = paste_object(rng, truth, track)
        if np.count_nonzero(holes) >= LEAST_HOLE * holes.size:
            return Clip(shown, holes, truth)
    raise InputError(f"{folder}: {MOST_DRAWS} objects in a row are next to nowhere in its frames; change --seed")
