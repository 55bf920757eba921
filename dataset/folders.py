"""Finding and reading the frames of DAVIS-2017's and YouTube-VOS's folders."""

import codecs
import hashlib
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError
from common.files import write_json
from dataset.images import KINDS, BrokenFrame, describe_content, is_hidden, list_frames, read_frames, sort_folders


@dataclass(frozen=True)
class Video:
    folder: Path
    frames: tuple[Path, ...]
    broken: str = ""  # why its folder cannot be listed

    @property
    def name(self):
        return self.folder.name

    @property
    def folders(self):
        """Where its pictures lie."""
        return (self.folder,)

    @property
    def files(self):
        return self.frames

    def read(self):
        """Read every picture. Raises BrokenFrame."""
        read_frames(self.frames)


def scan_davis(root):
    """The videos that ImageSets/2017/train.txt names, in JPEGImages/480p."""
    names_file = Path(root, "ImageSets/2017/train.txt")
    images = existing_folder(root, "JPEGImages/480p", "--davis_root")
    if not names_file.is_file():
        raise InputError(
            f"{names_file} is missing: DAVIS-2017's list of training videos was needed; check --davis_root"
        )
    names = read_names(names_file, images)
    if not names:
        raise InputError(f"{names_file} names no video: fetch DAVIS-2017's list of training videos again")
    absent = [name for name in names if not Path(images, name).is_dir()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise InputError(f"{names_file} names {absent[0]}{more}, which {images} lacks: unpack it or remove the line")
    return scan_videos([Path(images, name) for name in names], images)


def read_validation_names(davis_root):
    """The names in DAVIS's ImageSets/2017/val.txt, in its order; none where there is no such file."""
    path = Path(davis_root, "ImageSets/2017/val.txt")
    return read_names(path, Path(davis_root, "JPEGImages/480p")) if path.is_file() else []


def read_names(path, root):
    """The names of folders in `root` that a file lists, one a line, as any editor writes it: UTF-8 with or without a
    mark, UTF-16 by its mark, either end of line. A name that comes twice is taken once, and said."""
    content = Path(path).read_bytes()
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        names = split_lines(content.decode("utf-16" if marked else "utf-8-sig"))
    except UnicodeDecodeError:
        # Folders may have names that are no UTF-8, and the list the same bytes.
        names = split_lines(os.fsdecode(content))
        if marked or not all(Path(root, name).is_dir() for name in names):
            raise InputError(f"{path} is neither UTF-8 nor marked as UTF-16: save it as UTF-8, a name a line") from None
    if any("\0" in name for name in names):
        raise InputError(f"{path} is no list of names, or UTF-16 without its mark: save it as UTF-8, a name a line")
    unique = list(dict.fromkeys(names))
    if len(unique) < len(names):
        twice = next(name for name in unique if names.count(name) > 1)
        print(f"warning: {path} names {twice} more than once: it is taken once", file=sys.stderr, flush=True)
    return unique


def split_lines(text):
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def scan_ytvos(root):
    """Every folder of JPEGImages."""
    images = existing_folder(root, "JPEGImages", "--ytvos_root")
    folders = list_folders(images, with_dead_links=True)
    if not folders:
        raise InputError(
            f"{images} holds no folder of frames but {describe_content(images)}: unpack YouTube-VOS there or change "
            "--ytvos_root"
        )
    return scan_videos(folders, images)


def list_folders(root, with_dead_links=False):
    """The folders of videos in `root`, in their order; hidden ones are none. With links that lead nowhere, if told to:
    to a disk that is not mounted, for one."""

    def is_one(entry):
        return entry.is_dir() or (with_dead_links and entry.is_symlink() and not os.path.exists(entry.path))

    with os.scandir(root) as entries:
        return sort_folders([Path(entry.path) for entry in entries if is_one(entry) and not is_hidden(entry.name)])


def scan_videos(folders, root):
    """Their videos. Raises InputError where none of them has a frame."""
    videos = [scan_video(folder) for folder in folders]
    if not any(video.frames for video in videos):
        raise InputError(f"no folder in {root} holds frames: {videos[0].broken}")
    return videos


def existing_folder(root, subfolder, flag):
    folder = Path(root, subfolder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: a dataset's root with {subfolder}/ in it was needed; check {flag}")
    return folder


def scan_video(folder):
    """The Video of a folder; what is wrong with the folder is noted in it."""
    frames, broken = (), ""
    try:
        frames = list_frames(folder)
        if not frames:
            broken = f"{folder} holds {describe_content(folder)}: {KINDS} were needed"
    except OSError as error:
        broken = f"{folder} cannot be listed ({error.strerror})"
    except BrokenFrame as error:
        broken = str(error)
    return Video(folder, frames, broken)


def list_videos(args):
    """Every training video of both datasets, each once."""
    davis = scan_davis(args.davis_root) if args.davis_root else []
    return davis + (scan_ytvos(args.ytvos_root) if args.ytvos_root else [])


def find_broken(video):
    """What is wrong with a video's frames, all of which are read; None: nothing."""
    try:
        video.read()
    except BrokenFrame as error:
        return str(error)
    return None


def scan_frames(videos, memory, processes, remember=True):
    """{folder: reason} of those videos with a broken frame; every frame is read, in `processes` processes.

    What was found before is taken from the file `memory` for folders whose files keep their names, sizes and times; if
    told to `remember`, what is new is added to it.
    """
    known = read_scan(memory) if Path(memory).is_file() else {}
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


def read_scan(path):
    """{folder: [listing_key, reason or None]} of an earlier scan."""
    try:
        known = json.loads(path.read_bytes())
        if all(isinstance(entry, list) and len(entry) == 2 for entry in known.values()):
            return known
    except (ValueError, AttributeError):  # no JSON, or no object
        pass
    raise InputError(f"{path} is no earlier scan's: move it, or choose another --output_dir")


def size_and_time(path):
    """(bytes, nanoseconds); (0, 0) of a link that leads nowhere, which reading it will say."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def listing_key(video):
    """A short hash of the names, sizes and times of a video's files."""
    stats = [(path.name, *size_and_time(path)) for path in video.files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
