"""Batches: which clip comes when, what stands in for a broken one, and the bytes of several as tensors."""

from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from common.errors import InputError
from dataset.images import BrokenFrame

MAX_REPLACEMENTS = 20  # broken videos in a row, before a sample is given up


class TrainingClips(Dataset):
    """What the trainer's loader reads: clips in bytes by (epoch, index), so that the epoch reaches every worker.

    A clip whose video turns out to be broken is replaced by another one that follows from (seed, epoch, index) too.
    With a LatentCache, what it holds of a clip's frames comes along.
    """

    def __init__(self, dataset, cache=None):
        self.dataset, self.cache = dataset, cache

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        broken, rng = [], np.random.default_rng([self.dataset.seed, epoch, index, 1])
        for _ in range(MAX_REPLACEMENTS):
            try:
                return replace(self.dataset.clip(index, epoch), broken=tuple(broken))
            except BrokenFrame as error:
                broken.append(f"{error.video or self.dataset.source(index, epoch)[0].name}: {error}")
                index = int(rng.integers(len(self)))
        raise InputError(
            f"{MAX_REPLACEMENTS} broken videos in a row, the last of them {broken[-1]}: check with --scan_data"
        )

    def collate(self, clips):
        """A batch: frames (b, f, h, w, 3) and holes (b, f, h, w) in bytes, lists of the rest.

        Where a clip shows other frames around its hole, also `conditioning_frames`, like frames.
        With a cache also `posteriors` (b, f, 2c, h/8, w/8) and, for each of the b * f frames, its key in `missing`
        where its posterior is not held.
        """
        batch = {
            "frames": torch.from_numpy(np.stack([clip.frames for clip in clips])),
            "holes": torch.from_numpy(np.stack([clip.holes for clip in clips])),
            "prompts": [clip.prompt for clip in clips],
            "noise_seeds": [clip.noise_seed for clip in clips],
            "videos": [clip.video for clip in clips],
            "broken": [line for clip in clips for line in clip.broken],
        }
        if any(clip.conditioning_frames is not None for clip in clips):
            batch["conditioning_frames"] = torch.from_numpy(np.stack([clip.shown_frames for clip in clips]))
        if self.cache:
            held = [self.cache.read(clip.paths) for clip in clips]
            batch["posteriors"] = torch.stack([posteriors for posteriors, _ in held])
            batch["missing"] = [key for _, missing in held for key in missing]
        return batch


class EpochSampler(Sampler):
    """(epoch, index) keys: every clip once per epoch, in an order that follows from (seed, epoch) alone.

    Epochs follow each other without a gap, so that one batch may hold the end of an epoch and the start of the next:
    every batch is full and no clip is repeated or left out, whatever the numbers of clips, processes and batches are.
    `start` and `stop` are positions in this stream.
    """

    def __init__(self, length, seed, start, stop):
        self.length, self.seed, self.start, self.stop = length, seed, start, stop

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        order = None
        for position in range(self.start, self.stop):
            epoch, place = divmod(position, self.length)
            if order is None or place == 0:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            yield epoch, int(order[place])
