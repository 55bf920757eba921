"""Work on many pictures at once."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

AHEAD = 2  # items per core that are computed before they are asked for
MOST_CORES = 8  # each holds pictures, of 6 MB at 1080p; ffmpeg's own threads use the others


def in_threads(function, *iterables):
    """`map` of iterables of one length, in threads: results come in order, and a few are computed ahead. For functions
    that release Python's lock most of the time, as OpenCV's and Pillow's do."""
    cores = min(MOST_CORES, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(cores) as pool:
        waiting = deque()
        for items in zip(*iterables, strict=True):
            waiting.append(pool.submit(function, *items))
            if len(waiting) > AHEAD * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
