"""Pairs: videos with an object, the same without it, and masks of it.

<root>/<video>/with, without and masks hold pictures of equal names and size; in masks any value above 0 is hole. What
is learned is `without`; what BrushNet sees around the hole is `with`, so that shadows and rims that a mask misses are
cleared.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from common.command_line import require
from common.errors import InputError
from common.threads import in_threads
from dataset.folders import Video, list_folders, scan_video
from dataset.images import BrokenFrame, describe_content, image_size, read_frames, read_mask, size_of

FOLDERS = ("with", "without", "masks")
DEFAULT_SHARE = 0.3
IMPORTER = "python -m libs.inference.import_pairs"


@dataclass(frozen=True)
class PairedVideo(Video):
    """`frames` are those without the object."""

    with_frames: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    size: str = ""  # of all its pictures, such as 854x480

    @property
    def shape(self):
        """(height, width)."""
        width, height = self.size.split("x")
        return int(height), int(width)

    @property
    def folders(self):
        return (self.folder, *(self.folder / name for name in FOLDERS))

    @property
    def files(self):
        return self.frames + self.with_frames + self.masks

    def read(self):
        """Read every picture. Raises BrokenFrame."""
        for paths in (self.frames, self.with_frames):
            refuse_other_size(self.size, paths, read_frames(paths))
        refuse_other_size(self.size, self.masks, [read_mask(path) for path in self.masks])


def refuse_other_size(size, paths, pictures):
    """The pictures, as they were read from the paths. Raises BrokenFrame for one of another size."""
    for path, picture in zip(paths, pictures, strict=True):
        if size_of(picture) != size:
            raise BrokenFrame(f"{path} is {size_of(picture)}, the pair's other pictures are {size}")
    return pictures


def settle_paired_share(args):
    """args.paired_share as a number, where there are pairs. Raises InputError for one that means nothing, and for masks
    of other videos where there are none."""
    given, alone = args.paired_share, not (args.davis_root or args.ytvos_root)
    require(args.paired_root or given is None, f"--paired_share={given} without --paired_root: give both or neither")
    if args.paired_root:
        require(
            not alone or given in (None, 1),
            f"--paired_share={given}: with --davis_root and --ytvos_root empty all clips come from pairs; leave it out",
        )
        require(
            not alone or not args.masks_of_videos,
            f"--masks_of_videos={args.masks_of_videos}: pairs have masks of their own, and there are no other videos; "
            "leave it out, or give --davis_root or --ytvos_root",
        )
        args.paired_share = (1.0 if alone else DEFAULT_SHARE) if given is None else given


def scan_pairs(root):
    """The videos of --paired_root.

    Raises: InputError where there are none, or where one's folders differ in number, names or size, or have no hole.
    """
    needed = "a folder per video with with/, without/ and masks/ in it was needed"
    if not Path(root).is_dir():
        raise InputError(f"{root} is no folder: {needed}; check --paired_root")
    folders = list_folders(root)
    if not any(Path(folder, name).is_dir() for folder in folders for name in FOLDERS):
        raise InputError(
            f"{root} holds no pair but {describe_content(root)}: {needed}; `{IMPORTER}` unpacks published datasets"
        )
    return list(in_threads(scan_pair, folders))


def scan_pair(folder):
    """The PairedVideo of a folder; the sizes are those of the first pictures. Raises InputError: see scan_pairs."""
    for name in FOLDERS:
        if not Path(folder, name).is_dir():
            raise InputError(f"{folder} has no {name}/: complete the pair, or remove it")
    with_video, video, masks = (scan_video(Path(folder, name)) for name in FOLDERS)
    broken = with_video.broken or video.broken or masks.broken
    check_names(folder, {name: v.frames for name, v in zip(FOLDERS, (with_video, video, masks), strict=True)})
    size = ""
    if not broken:
        try:
            size = check_sizes([v.frames[0] for v in (video, with_video, masks)])
            require(has_hole(masks.frames), f"{folder}/masks: none of {len(masks.frames)} masks has a hole, which is "
                    "any value above 0; mend them, or remove the pair")  # fmt: skip
        except BrokenFrame as error:
            broken = str(error)
    return PairedVideo(folder, video.frames, broken, with_video.frames, masks.frames, size)


def check_names(folder, by_name):
    """Raise InputError where a pair's folders differ in their pictures' number or names; extensions may differ."""
    counts = {name: len(paths) for name, paths in by_name.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name}/ has {count}" for name, count in counts.items())
        raise InputError(f"{folder}: {found} pictures: the same number was needed; complete the pair, or remove it")
    for name in ("with", "masks"):
        for path, other in zip(by_name["without"], by_name[name], strict=True):
            if path.stem != other.stem:
                raise InputError(
                    f"{folder}: where without/ has {path.name}, {name}/ has {other.name}: equal names were needed; "
                    "rename them, or remove the pair"
                )


def check_sizes(paths):
    """Their one size, from headers alone. Raises InputError where they differ, BrokenFrame for what is no image."""
    try:
        sizes = [image_size(path) for path in paths]
    except InputError as error:
        raise BrokenFrame(str(error)) from None
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise InputError(
                f"{path} is {size}, {paths[0]} is {sizes[0]}: a pair's pictures need one size; scale them, or remove "
                "the pair"
            )
    return sizes[0]


def has_hole(masks):
    """Whether any of them has one: the middle one first, which mostly does."""
    order = sorted(range(len(masks)), key=lambda i: abs(i - len(masks) // 2))
    return any(read_mask(masks[i]).any() for i in order)


def draw_window(rng, video, span, stride, crop):
    """A random window of a pair, played backwards half of the time, with a hole in the crop of at least one frame.

    Args:
        span: frames from the first to the last, of which every `stride`th is taken.

    Returns: indices (f,) of its frames, and holes (f, h, w) uint8, 255 = hole.
    Raises: BrokenFrame where no window has one.
    """

    @cache
    def hole(i):
        mask = read_mask(video.masks[i])
        refuse_other_size(video.size, [video.masks[i]], [mask])
        out = np.empty(crop.size[::-1], np.uint8)
        crop.resize(mask, out, nearest=True)
        return out

    starts = rng.permutation(len(video.frames) - span + 1)
    step = -1 if rng.random() < 0.5 else 1
    for start in starts:
        window = np.arange(start, start + span, stride)[::step]
        holes = np.stack([hole(int(i)) for i in window])
        if holes.any():
            return window, holes
    raise BrokenFrame(f"{video.folder}/masks has no hole inside the crop of the frames in any window of its masks")


def read_window(video, window):
    """The frames without and with the object, two lists of (h, w, 3) uint8. Raises BrokenFrame."""
    chosen = ([paths[i] for i in window] for paths in (video.frames, video.with_frames))
    return (refuse_other_size(video.size, paths, read_frames(paths)) for paths in chosen)
