"""Seconds per training clip on one core, masks included, from a dataset's own frames.

    python -m benchmarks.data_loading --davis_root dataset/DAVIS --ytvos_root ''

Prints one JSON line for 10 and one for 22 frames.
"""

import argparse
import json
import statistics
import time

from dataset.crop import RESOLUTION_HELP, resolution
from dataset.finetune_dataset import FinetuneDataset


def measure(options):
    start, clips = time.perf_counter(), options.clips
    dataset = FinetuneDataset(options)
    scan = time.perf_counter() - start
    seconds = []
    for i in range(clips):
        start = time.perf_counter()
        dataset.clip(i * len(dataset) // clips, 0)
        seconds.append(time.perf_counter() - start)
    return {
        "nframes": options.nframes,
        "resolution": options.resolution,
        "clips": clips,
        "median_s": round(statistics.median(seconds), 4),
        "max_s": round(max(seconds), 4),
        "scan_s": round(scan, 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--davis_root", default="dataset/DAVIS")
    parser.add_argument("--ytvos_root", default="dataset/YTBV")
    parser.add_argument("--resolution", type=resolution, default=512, help=RESOLUTION_HELP)
    parser.add_argument("--clips", type=int, default=40)
    options = parser.parse_args()
    for nframes in (10, 22):
        options.nframes = nframes
        print(json.dumps(measure(options)))
