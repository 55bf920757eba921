"""Damaged and odd files through the readers: a result or one line, never a traceback, a signal, or a hang.

python -m tests.fuzz_files --count 2000 --seed 0
"""

import argparse
import io
import multiprocessing
import resource
import signal
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from common.errors import InputError
from dataset.folders import read_names
from dataset.images import find_hole, image_size, read_frame, read_mask_values
from libs.inference.video import Masks, open_video
from tests.clips import moving_video, write_mp4

IMAGES = (".jpg", ".png", ".webp", ".tif", ".bmp")
VIDEOS = (".mp4", ".webm", ".mkv", ".avi")
LISTS = (".txt",)
SECONDS = 10
GIB = 1.0


def make_originals(folder):
    """Whole files of every kind."""
    frames, holes = moving_video(4, 48, 64)
    originals = []
    for suffix in IMAGES:
        for kind, picture in (("frame", frames[0]), ("mask", holes[0]), ("deep", holes[0].astype(np.uint16) * 257)):
            if kind != "deep" or suffix in (".png", ".tif"):
                cv2.imwrite(str(folder / f"{kind}{suffix}"), picture)
                originals.append(folder / f"{kind}{suffix}")
    palette = Image.fromarray(holes[0] // 255, mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(folder / "palette.png")
    write_mp4(folder / "video.mp4", frames, 12)
    lists = {"utf8.txt": b"kites\nmarbles\n", "utf16.txt": "kites\r\nmarbles\r\n".encode("utf-16"),
             "bom.txt": "kites\n".encode("utf-8-sig"), "gbk.txt": "风筝\r\n".encode("gbk")}  # fmt: skip
    for name, content in lists.items():
        (folder / name).write_bytes(content)
    return [*originals, folder / "palette.png", folder / "video.mp4", *(folder / name for name in lists)]


def damage(rng, content, others):
    """One kind of damage at random: (its name, the content)."""
    kind = rng.choice(["cut", "flip", "header", "zeros", "empty", "noise", "joined", "repeated", "whole"])
    content = bytearray(content)
    if kind == "cut":
        return kind, bytes(content[: rng.integers(len(content))])
    if kind == "flip":
        for place in rng.integers(len(content), size=rng.integers(1, 30)):
            content[place] ^= 1 << int(rng.integers(8))
    elif kind == "header":
        start = int(rng.integers(64))
        content[start : start + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\x7f\xff"])
    elif kind == "zeros":
        start, length = rng.integers(len(content)), rng.integers(len(content))
        content[start : start + length] = bytes(len(content[start : start + length]))
    elif kind == "empty":
        content = b""
    elif kind == "noise":
        content = rng.bytes(int(rng.integers(1, 5000)))
    elif kind == "joined":
        content = bytes(content[: rng.integers(len(content))]) + others[rng.integers(len(others))]
    elif kind == "repeated":
        content = content * 3
    return kind, bytes(content)


def read_image(path):
    read_frame(path)


def read_mask(path):
    find_hole(*read_mask_values(path))


def read_clip(path):
    for _ in open_video(path).frames():
        pass


def read_mask_clip(path):
    for _ in Masks(path).frames():
        pass


def read_list(path):
    read_names(path, path.parent)


READERS = (read_image, read_mask, image_size, read_clip, read_mask_clip, read_list)


def run_case(number, seed, folder, originals, contents):
    """What came of a case: "result", "line", or raises whatever is neither."""
    rng = np.random.default_rng([seed, number])
    chosen = rng.integers(len(originals))
    _, content = damage(rng, contents[chosen], contents)
    suffix = originals[chosen].suffix if rng.random() < 0.8 else rng.choice(IMAGES + VIDEOS + LISTS)
    reader = READERS[rng.integers(len(READERS))]
    path = folder / f"case{suffix}"
    path.write_bytes(content)
    try:
        with redirect_stderr(io.StringIO()):
            reader(path)
    except InputError as error:
        assert "\n" not in str(error).strip(), f"{reader.__name__}: more than one line: {error}"
        return "line"
    return "result"


def work(first, count, seed, pipe):
    """Cases in a process of its own; says which is being tried, so that the case that ends it is known."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        originals = make_originals(folder)
        contents = [path.read_bytes() for path in originals]
        for number in range(first, count):
            pipe.send((number, "begun"))
            signal.alarm(SECONDS)
            begin = time.process_time()
            try:
                outcome = run_case(number, seed, folder, originals, contents)
            except Exception as error:
                outcome = f"FAILED {type(error).__name__}: {error}"
            signal.alarm(0)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            if peak > GIB + START:
                pipe.send((number, f"FAILED {peak:.1f} GiB ({outcome})"))
                return  # a new process goes on, whose peak starts anew
            pipe.send((number, outcome, time.process_time() - begin, peak - START))
    pipe.send((count, "done"))


START = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # what the libraries take


def fuzz(count, seed=0):
    """(Counter of outcomes, ["case number: what went wrong"], [most CPU seconds of a case, most GiB])."""
    context, outcomes, failures, first = multiprocessing.get_context("fork"), Counter(), [], 0
    worst = [0.0, 0.0]
    while first < count:
        begun, (receiver, sender) = first, context.Pipe(duplex=False)
        child = context.Process(target=work, args=(first, count, seed, sender))
        child.start()
        sender.close()
        try:
            while True:
                number, outcome, *taken = receiver.recv()
                worst = [max(pair) for pair in zip(worst, taken, strict=True)] if taken else worst
                if outcome.startswith("FAILED"):
                    failures.append(f"case {number}: {outcome}")
                elif outcome in ("line", "result"):
                    outcomes[outcome] += 1
                first = number + 1
        except EOFError:
            child.join()
        if first == begun:
            raise RuntimeError(f"no case was begun: status {child.exitcode}")
        if child.exitcode:
            failures.append(f"case {first - 1}: ended by signal {-child.exitcode}")
    return outcomes, failures, worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found, wrong, (seconds, gib) = fuzz(options.count, options.seed)
    print(dict(found), f"{len(wrong)} failures; at most {seconds:.2f} CPU seconds and {gib:.2f} GiB", *wrong, sep="\n")
    raise SystemExit(bool(wrong))
