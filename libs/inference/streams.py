"""Streams of frames: anything with len() that can be iterated more than once, in order, such as an array (f, h, w, 3),
a list, a reader of a video file, or a function of other streams. Nothing keeps a whole clip in memory.
"""

from itertools import islice

import numpy as np

from common.threads import in_threads


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
        return in_threads(self.function, *self.streams)


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
