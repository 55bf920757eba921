"""Streams of frames: anything with len() that can be iterated more than once, in order, such as an array (f, h, w, 3),
a list, a reader of a video file, or a function of other streams. Nothing keeps a whole clip in memory.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

AHEAD = 2  # items per core that are computed before they are asked for


class Stream:
    """`count` items, which `read()` iterates over anew each time."""

    def __init__(self, count, read):
        self.count, self.read = count, read

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(self.read())


class Mapped:
    """`function` of one item of each stream, computed whenever it is read, on all cores."""

    def __init__(self, function, *streams):
        self.function, self.streams = function, streams

    def __len__(self):
        return len(self.streams[0])

    def __iter__(self):
        return in_threads(self.function, zip(*self.streams, strict=True))


def in_threads(function, items):
    """Yield function(*item) of every item, in order; a few are computed ahead. For functions that release Python's lock
    most of the time, as OpenCV's and Pillow's do."""
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, *item))
            if len(waiting) > AHEAD * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def first(stream):
    return next(iter(stream))


def pick(stream, numbers):
    """The items of these numbers, ascending, as one array."""
    wanted = set(numbers)
    return np.stack([item for number, item in enumerate(stream) if number in wanted])


def in_chunks(stream, size):
    """Yield arrays of `size` items, the last one shorter."""
    items = iter(stream)
    while chunk := list(islice(items, size)):
        yield np.stack(chunk)
