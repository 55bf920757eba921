"""Unpack a published dataset of pairs, videos with and without an object, into the folders that --paired_root reads.

python -m libs.inference.import_pairs ROSE-Dataset my-pairs

Each pair becomes my-pairs/<name>/with, without (JPEGs of quality 95) and masks (PNGs, 255 = hole). Nothing is
overwritten: what is there already is kept, so that the same command goes on where it was interrupted. Layouts:
docs/data.md.
"""

import functools
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from common.command_line import Parser, at_least, require
from common.errors import InputError, one_line_errors
from common.files import check_writable
from common.threads import in_threads
from dataset.images import describe_content, is_hidden
from dataset.pairs import FOLDERS
from libs.inference.video import open_video

JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95]
LIGHT = 127  # above it, masks that mark the object in white
DARK = 95  # up to it, masks that mark the object in black (0, or 63 where more than the object changes)


@dataclass(frozen=True)
class Pair:
    """The three videos of a pair, as published."""

    name: str
    with_object: Path
    without: Path
    mask: Path
    is_hole: Callable  # a mask's grey values (h, w) -> bool (h, w)


def is_light(grey):
    return grey > LIGHT


def is_dark(grey):
    return grey <= DARK


def find_rose(source):
    """Env1/Env1_Unedited/CineCameraSequence_0.mp4, the same in Env1_Edited and, white = object, in Env1_Masked.

    https://huggingface.co/datasets/Kunbyte/ROSE-Dataset; its Benchmark/ is for evaluation and left out.
    """
    for folder in (*source.glob("*_Unedited"), *source.glob("*/*_Unedited")):
        scene = folder.name.removesuffix("_Unedited")
        unedited, edited, masked = (folder.with_name(f"{scene}_{kind}") for kind in ("Unedited", "Edited", "Masked"))
        yield from match(unedited, [edited], [masked], prefix=f"{scene}_")


def find_vor(source):
    """FG_BG/REAL_ENV105_00001_001_03.mp4, the same in BG and, white = object, in MASK, as the archives are unpacked.

    https://huggingface.co/datasets/FudanCVL/EffectErase; its VOR-Eval is for evaluation and left out.
    """
    found = {}
    for name in ("FG_BG", "BG", "MASK"):
        found[name] = [path for path in find_below(source, name) if "VOR-Eval" not in path.relative_to(source).parts]
    if all(found.values()):
        for folder in found["FG_BG"]:  # of each part of the archive; its other files may lie with another part
            yield from match(folder, found["BG"], found["MASK"])


def find_tuples(source):
    """A folder per pair with rgb_full.mp4, rgb_removed.mp4 and mask.mp4, black = object.

    GenOmnimatte: 0 = object, 128 = background, 255 = objects that stay, as its datasets/ write them
    (https://github.com/gen-omnimatte/gen-omnimatte-public). VOID: 0 = object, 63 = object where something else changes
    too, 127 = that change elsewhere, 255 = the rest; its second generator has rgb_altered_physics.mp4 in place of
    rgb_removed.mp4 (https://github.com/Netflix/void-model/tree/main/data_generation).
    """
    for full in find_below(source, "rgb_full.mp4"):
        folder = full.parent
        removed = first_file([folder / "rgb_removed.mp4", folder / "rgb_altered_physics.mp4"])
        name = "_".join(folder.relative_to(source).parts) or folder.resolve().name
        yield Pair(name, full, removed, folder / "mask.mp4", is_dark)


LAYOUTS = (find_rose, find_vor, find_tuples)


def find_below(source, name):
    """What has that name in a folder, or at most two folders below it; nothing in hidden ones."""
    found = [path for depth in ("", "*/", "*/*/") for path in source.glob(depth + name)]
    return [path for path in found if not any(is_hidden(part) for part in path.relative_to(source).parts)]


def first_file(paths):
    """The first of them that is there; where none is, the first of all, and opening it says so."""
    return next((path for path in paths if path.is_file()), paths[0])


def match(with_object, without, masks, prefix=""):
    """Pairs of a folder's videos and those of their names in one of the folders `without` and one of `masks`."""
    for path in with_object.glob("*.mp4"):
        if not is_hidden(path.name):
            others = (first_file([folder / path.name for folder in folders]) for folders in (without, masks))
            yield Pair(prefix + path.stem, path, *others, is_light)


def is_unpacked(folder):
    return all(Path(folder, name).is_dir() for name in FOLDERS)


def unpack(pair, target):
    """Write a pair's frames and masks to target/<name>, which is there as a whole or not at all; returns their number.

    Raises: InputError where the videos cannot be read, differ in length or size, or have no hole, and where something
    else has that name.
    """
    blocked = os.path.lexists(target / pair.name)  # also by a link that leads nowhere
    require(not blocked, f"{target / pair.name} is there and no pair: move it, or choose another target")
    videos = [open_video(path) for path in (pair.with_object, pair.without, pair.mask)]
    looks = [f"{len(video)} frames of {video.width}x{video.height}" for video in videos]
    if len(set(looks)) > 1:
        found = ", ".join(f"{video.path} has {look}" for video, look in zip(videos, looks, strict=True))
        raise InputError(f"{found}: equal ones were needed")
    partial = target / f".{pair.name}.partial"  # hidden: a killed run's is no pair
    shutil.rmtree(partial, ignore_errors=True)
    for name, video in zip(FOLDERS, videos, strict=True):
        folder = partial / name
        folder.mkdir(parents=True)
        write = functools.partial(write_hole, pair.is_hole) if name == "masks" else write_frame
        paths = [folder / f"{i:05d}" for i in range(len(video))]
        hole = any([*in_threads(write, paths, video.frames())])
    if not hole:  # of the masks, which come last
        shutil.rmtree(partial)
        raise InputError(f"{pair.mask} has no hole in any frame")
    partial.rename(target / pair.name)
    return len(videos[0])


def write_frame(path, frame):
    """(h, w, 3) uint8 RGB. The videos have lost more already, and PNGs would take several times the space."""
    path.with_suffix(".jpg").write_bytes(cv2.imencode(".jpg", frame[..., ::-1], JPEG)[1])


def write_hole(is_hole, path, frame):
    """255 = hole, of a frame (h, w, 3) of a mask's video; whether there is one."""
    hole = np.where(is_hole(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)), 255, 0).astype(np.uint8)
    path.with_suffix(".png").write_bytes(cv2.imencode(".png", hole)[1])
    return hole.any()


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="the dataset's folder, as it was downloaded and unpacked")
    parser.add_argument("target", type=Path, help="the folder to write to: --paired_root")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N pairs by name only")
    args = parser.parse_args(argv)
    at_least(1, args, "limit")
    found = (sorted(find(args.source), key=lambda pair: (pair.name, pair.with_object)) for find in LAYOUTS)
    pairs = next(filter(None, found), [])
    if not pairs:
        raise InputError(
            f"{args.source} holds no pairs in a known layout ({describe_content(args.source)}): docs/data.md shows them"
            if args.source.is_dir() else f"{args.source} is no folder: a dataset's folder was needed"
        )  # fmt: skip
    check_writable(args.target, "target")
    import_pairs(pairs[: args.limit], args.target)


def import_pairs(pairs, target):
    """Unpack those that are not there, with a line on each; one that is no pair is named and left out."""
    left_out, taken = 0, {}
    for number, pair in enumerate(pairs, start=1):
        try:
            first = taken.setdefault(pair.name, pair)
            require(first is pair, f"{pair.with_object} and {first.with_object} get one name: rename a folder")
            said = "is there already" if is_unpacked(target / pair.name) else f"{unpack(pair, target)} frames"
        except InputError as error:
            left_out += 1
            print(f"left out: {pair.name}: {error}", file=sys.stderr, flush=True)
            continue
        print(f"{number}/{len(pairs)}  {pair.name}  {said}", flush=True)
    if left_out == len(pairs):
        raise InputError(f"none of {len(pairs)} pairs could be unpacked: see the lines above")
    print(f"{len(pairs) - left_out} of {len(pairs)} pairs are in {target}: train with PAIRED_ROOT={target}")


if __name__ == "__main__":
    main()
