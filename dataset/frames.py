"""Finding and reading the frames of DAVIS-2017's and YouTube-VOS's folders."""

import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from libs.errors import InputError
from libs.files import write_json

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Video:
    folder: Path
    frames: tuple[Path, ...]
    broken: str = ""  # why its folder cannot be listed

    @property
    def name(self):
        return self.folder.name


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


def scan_davis(root):
    """The videos that ImageSets/2017/train.txt names, in JPEGImages/480p."""
    names_file, images = (
        Path(root, "ImageSets/2017/train.txt"),
        existing_folder(root, "JPEGImages/480p", "--davis_root"),
    )
    if not names_file.is_file():
        raise InputError(
            f"{names_file} is missing: DAVIS-2017's list of training videos was needed; check --davis_root"
        )
    names = names_file.read_text().split()
    if not names:
        raise InputError(f"{names_file} names no video: fetch DAVIS-2017's list of training videos again")
    absent = [name for name in names if not Path(images, name).is_dir()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise InputError(f"{names_file} names {absent[0]}{more}, which {images} lacks: unpack it or remove the line")
    return [scan_video(Path(images, name)) for name in names]


def scan_ytvos(root):
    """Every folder of JPEGImages."""
    images = existing_folder(root, "JPEGImages", "--ytvos_root")
    with os.scandir(images) as entries:
        folders = sorted(entry.path for entry in entries if entry.is_dir())
    videos = [scan_video(Path(folder)) for folder in folders]
    if not videos:
        raise InputError(f"{images} holds no folder of frames: unpack YouTube-VOS there or change --ytvos_root")
    return videos


def existing_folder(root, subfolder, flag):
    folder = Path(root, subfolder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: a dataset's root with {subfolder}/ in it was needed; check {flag}")
    return folder


def scan_video(folder):
    try:
        return Video(folder, list_frames(folder))
    except OSError as error:
        return Video(folder, (), broken=f"{folder} cannot be listed ({error.strerror})")
    except BrokenFrame as error:
        return Video(folder, (), broken=str(error))


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


def list_videos(args):
    """Every training video of both datasets, each once."""
    davis = scan_davis(args.davis_root) if args.davis_root else []
    return davis + (scan_ytvos(args.ytvos_root) if args.ytvos_root else [])


def find_broken(video):
    """What is wrong with a video's frames, all of which are read; None: nothing."""
    try:
        read_frames(video.frames)
    except BrokenFrame as error:
        return str(error)
    return None


def scan_frames(args, memory, processes, remember=True):
    """{folder: reason} of the videos with a broken frame; every frame is read, in `processes` processes.

    What was found before is taken from the file `memory` for folders whose files keep their names, sizes and times; if
    told to `remember`, what is new is added to it.
    """
    videos = list_videos(args)
    known = json.loads(Path(memory).read_text()) if Path(memory).is_file() else {}
    keys = {str(video.folder): listing_key(video) for video in videos}
    new = [video for video in videos if known.get(str(video.folder), [None])[0] != keys[str(video.folder)]]
    if new:
        # An executor, because Pool ends its workers by SIGTERM, which the trainer's processes take for a wish to save.
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
            for video, reason in zip(new, pool.map(find_broken, new, chunksize=4), strict=True):
                known[str(video.folder)] = [keys[str(video.folder)], reason]
        if remember:
            write_json(memory, known)
    return {video.folder: known[str(video.folder)][1] for video in videos if known[str(video.folder)][1]}


def size_and_time(path):
    """(bytes, nanoseconds); (0, 0) of a link that leads nowhere, which reading it will say."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def listing_key(video):
    """A short hash of the names, sizes and times of a video's files."""
    stats = [(path.name, *size_and_time(path)) for path in video.frames]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
