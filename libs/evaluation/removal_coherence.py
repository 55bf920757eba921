"""RC-S and RC-T: whether what stands in the hole belongs there, in the eyes of DINOv2; the truth is not needed.

Li et al., PROVE: A Perceptual RemOVal cohErence Benchmark for Visual Media (https://arxiv.org/abs/2605.14534), with the
constants of the authors' published evaluation (https://github.com/xiaomi-research/prove), which takes DINOv2-giant and
a video's first 81 frames. Both compare two sets of DINOv2's patch features by their maximum mean discrepancy (MMD),
in windows that slide over a square cut out around the hole:

- RC-S, of every frame and each of its holes: the features in the hole with those around it in the same window, or,
  where the hole fills the window, with all around it in the square. exp(-MMD / 3), more is better.
- RC-T, of every two neighbouring frames: the features at the places that are hole in both. The MMD, less is better.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2Model

from common.hardware import full_precision
from libs.evaluation.vision_model import load_vision_model, normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1
PADDING = (123, 116, 103)  # about the same mean, in 0..255
SIDE = 448  # pixels that a square is brought to
WINDOW, STRIDE = 1 / 4, 1 / 8  # of the square's side
SMALLEST_PIECE = 200  # pixels: smaller holes do not count beside larger ones
LEAST_SPATIAL, LEAST_TEMPORAL = 6, 5  # patches that a set needs
SIGMA, MMD_SCALE, TAU = 10, 1000, 3
NEEDED = "--dinov2_weights needs a DINOv2 model's folder or Hub name; published numbers have facebook/dinov2-giant"


class RemovalCoherence(nn.Module):
    columns = ("rc_s", "rc_t")

    def __init__(self, model):
        super().__init__()
        self.model = model

    @full_precision()
    @torch.inference_mode()
    def describe(self, picture):
        """The features (n², d), of length 1, of n x n patches of a square picture (s, s, 3) uint8."""
        side = resized(len(picture))
        picture = cv2.resize(picture, (side, side), interpolation=cv2.INTER_LINEAR)
        more = self.patches(side) * self.patch - side
        picture = cv2.copyMakeBorder(picture, 0, more, 0, more, cv2.BORDER_CONSTANT, value=PADDING)
        tokens = self.model(pixel_values=normalize(picture, MEAN, STD, self.model.device)).last_hidden_state[0, 1:]
        return F.normalize(tokens.double(), dim=1)

    @property
    def patch(self):
        return self.model.config.patch_size

    def patches(self, side):
        return -(-side // self.patch)

    def pooled(self, hole):
        """(n, n) bool: the patches that a square hole (s, s), non-zero = hole, touches."""
        side = resized(len(hole))
        n = self.patches(side)
        hole = cv2.resize((hole > 0).astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
        hole = np.pad(hole, (0, n * self.patch - side))
        return hole.reshape(n, self.patch, n, self.patch).any(axis=(1, 3))

    def spatial(self, frame, hole):
        """RC-S of a frame (h, w, 3) with its hole (h, w): the mean over its pieces; nan where one has no score."""
        squares = [square_around(box, *hole.shape) for box in pieces(hole)]
        return float(np.mean([self.spatial_of_square(frame[square], hole[square]) for square in squares]))

    def spatial_of_square(self, picture, hole):
        """The same of a square (s, s, 3) and its hole (s, s); nan where no window has patches enough."""
        inside = self.pooled(hole)
        around, sets = np.flatnonzero(~inside), []
        for window in windows(len(inside)):
            held = inside.flat[window]
            known = window[~held] if not held.all() else around
            needed = LEAST_SPATIAL if not held.all() else 1
            if held.sum() >= LEAST_SPATIAL and len(known) >= needed:
                sets.append((window[held], known))
        if not sets:
            return np.nan
        features = self.describe(picture)
        return float(np.exp(-max(0.0, discrepancy(features, sets)) / TAU))

    def temporal(self, frames, holes):
        """RC-T of two frames (2, h, w, 3) and their holes (2, h, w); nan where they share no hole."""
        union = holes.any(axis=0)
        if not union.any():
            return np.nan
        square = square_around(cv2.boundingRect(union.astype(np.uint8)), *union.shape)
        both = np.logical_and(*(self.pooled(hole[square]) for hole in holes))
        shared = [window[both.flat[window]] for window in windows(len(both))]
        sets = [(places, places + both.size) for places in shared if len(places) >= LEAST_TEMPORAL]
        return discrepancy(torch.cat([self.describe(frame[square]) for frame in frames]), sets) if sets else np.nan

    def score(self, video, result):
        """[{"rc_s": ...}, ..., {"rc_t": ...}, ...] of the frames and of pairs of frames. `video`: Reference."""
        holes, pairs = video.holes, range(len(result) - 1)
        return [{"rc_s": self.spatial(result[t], holes[t])} for t in video.numbers] + [
            {"rc_t": self.temporal(result[t : t + 2], holes[t : t + 2])} for t in pairs
        ]


def resized(side):
    """SIDE, or by rounding one less, as published."""
    return int(side * (SIDE / side))


def pieces(hole):
    """Boxes (x, y, width, height) of a hole's connected pieces, without small ones beside larger ones."""
    _, _, stats, _ = cv2.connectedComponentsWithStats((hole > 0).astype(np.uint8), connectivity=4)
    stats = stats[1:]  # the first is what is not hole
    least = min(SMALLEST_PIECE, stats[:, cv2.CC_STAT_AREA].max())
    return [box for *box, area in stats.tolist() if area >= least]


def square_around(box, height, width):
    """The slices of a square with the box (x, y, width, height) in its middle and a third of its side more all around,
    as far as the frame goes; where it does not go that far, the margin is narrower on all sides."""
    left, top, box_width, box_height = box
    side = max(box_width, box_height)
    x, y = round(left + (box_width - side) / 2), round(top + (box_height - side) / 2)
    margin = max(0, min(round(side / 3), x, y, width - x - side, height - y - side, side // 2))
    side = min(side + 2 * margin, width, height)
    x, y = (min(max(0, start - margin), whole - side) for start, whole in ((x, width), (y, height)))
    return slice(y, y + side), slice(x, x + side)


def windows(n):
    """The numbers of the patches in every window that slides over n x n of them."""
    window, stride = (max(1, int(n * share)) for share in (WINDOW, STRIDE))
    numbers, starts = np.arange(n * n).reshape(n, n), range(0, n - window + 1, stride)
    return [numbers[y : y + window, x : x + window].ravel() for y in starts for x in starts]


def discrepancy(features, sets):
    """The mean MMD, in thousandths, over pairs of sets of features.

    Args:
        features: (n, d), of length 1.
        sets: [(numbers of the one set, numbers of the other)].

    With a weight of 1 / size for the first set's members and of -1 / size for the second's, an MMD is w' K w, where K
    are a Gaussian kernel's values for all pairs. The weights' sum is 0, so that K - 1 does as well, and keeps the
    digits that K, which is close to 1, has lost.
    """
    squared = (2 - 2 * features @ features.T).clamp(min=0)
    kernel = torch.expm1(squared / (-2 * SIGMA**2))
    weights = np.zeros((len(sets), len(features)))
    for row, (one, other) in zip(weights, sets, strict=True):
        row[one] += 1 / len(one)
        row[other] -= 1 / len(other)
    weights = torch.from_numpy(weights).to(features.device)
    return MMD_SCALE * float(((weights @ kernel) * weights).sum(dim=1).mean())


def load_dinov2(path):
    """RemovalCoherence with a DINOv2 model, on the CPU."""
    return RemovalCoherence(load_vision_model(Dinov2Model, path, ("dinov2",), NEEDED))
