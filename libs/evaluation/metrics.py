"""How good a filled hole is, where the true content is known: PSNR, SSIM and flow-warping error.

Frames are (f, h, w, 3) uint8 RGB in 0..255; holes (f, h, w) uint8, non-zero = hole. PSNR and SSIM are scikit-image's,
with the settings of the evaluation that ProPainter published (https://github.com/sczhou/ProPainter:
scripts/evaluate_propainter.py, core/metrics.py): frame by frame at a data range of 255, SSIM with a uniform window of
65 pixels on three channels, known pixels pasted back. (Its frames: 432x240.) They are averaged over the frames that
have a hole, of all videos; that evaluation takes all frames, which is the same where its masks leave none without one.
"""

from itertools import pairwise

import cv2
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from common.threads import in_threads

SSIM_WINDOW = 65  # the largest odd number that fits in smaller frames
SCORES = {  # name: (heading, decimals)
    "psnr": ("PSNR", 2),
    "ssim": ("SSIM", 4),
    "warp": ("E_warp", 2),
    "psnr_hole": ("PSNR hole", 2),
    "ssim_hole": ("SSIM hole", 4),
    "warp_hole": ("E_warp hole", 2),
}
SET_SCORES = {"vfid": ("VFID", 3)}  # of a set of videos, not of one: vfid.py
SMALLEST_FLOW = 16  # pixels: OpenCV's flow crashes in wide frames that are less high
# Where the flow there and back differs by more than this, a pixel is hidden in the other frame (Sundaram, Brox and
# Keutzer: Dense point trajectories by GPU-accelerated large displacement optical flow, ECCV 2010).
OCCLUSION_SLOPE, OCCLUSION_OFFSET = 0.01, 0.5


class Reference:
    """The true content of a video and its holes; its motion is found once for all results to be scored."""

    def __init__(self, frames, holes):
        self.frames, self.holes = frames, holes
        self.motions = list(in_threads(track, pairwise(frames)))

    def score(self, result):
        """{score: mean over the frames that have a hole}, the names as in SCORES; nan where there is no such frame."""
        numbers = np.flatnonzero(self.holes.any(axis=(1, 2)))
        frames = list(in_threads(lambda t: self.score_frame(result, t), zip(numbers, strict=True)))
        return {name: mean_of_numbers([scores.get(name, np.nan) for scores in frames]) for name in SCORES}

    def score_frame(self, result, t):
        """{score: value} of frame `t`, which has a hole; the last frame has no warping error."""
        hole, (mean, local) = self.holes[t] > 0, ssim(self.frames[t], result[t])
        scores = {
            "psnr": psnr(self.frames[t], result[t]),
            "psnr_hole": psnr(self.frames[t][hole], result[t][hole]),
            "ssim": mean,
            "ssim_hole": local[hole].mean(),
        }
        if t < len(self.motions):
            target, visible = self.motions[t]
            error = warping_error(result[t], result[t + 1], target)
            scores |= {"warp": mean_where(error, visible), "warp_hole": mean_where(error, visible & hole)}
        return scores

    @property
    def scored_frames(self):
        return int(self.holes.any(axis=(1, 2)).sum())


def psnr(truth, result):
    """Peak signal-to-noise ratio in dB of two uint8 arrays; infinite where they are equal."""
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(truth, result, data_range=255))


def ssim(truth, result):
    """(mean SSIM of two frames, its map averaged over the channels (h, w))."""
    height, width = truth.shape[:2]
    window = min(SSIM_WINDOW, (min(height, width) - 1) // 2 * 2 + 1)
    mean, local = structural_similarity(truth, result, data_range=255, channel_axis=-1, win_size=window, full=True)
    return float(mean), local.mean(axis=-1)


def track(first, second):
    """The motion from a frame to the next: (map (h, w, 2): where each pixel goes to, visible (h, w) bool).

    Dense Inverse Search flow (https://arxiv.org/abs/1603.03590), OpenCV's.
    """
    height, width = first.shape[:2]
    if min(height, width) < SMALLEST_FLOW:
        raise ValueError(f"frames of {width}x{height} are too small for optical flow")
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    there, back = flow.calc(*grey, None), flow.calc(*reversed(grey), None)
    target = there + np.dstack(np.meshgrid(np.arange(width), np.arange(height))).astype(np.float32)
    back = cv2.remap(back, target, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    size = (there**2).sum(axis=-1) + (back**2).sum(axis=-1)
    visible = ((there + back) ** 2).sum(axis=-1) <= OCCLUSION_SLOPE * size + OCCLUSION_OFFSET
    inside = (target >= 0).all(axis=-1) & (target <= (width - 1, height - 1)).all(axis=-1)
    return target, visible & inside


def warping_error(first, second, target):
    """(h, w): squared difference of a frame and the next one warped to it, in thousandths at a range of 0..1; its mean
    over the visible pixels is E_warp of Lai et al., https://arxiv.org/abs/1808.00449."""
    warped = cv2.remap(second.astype(np.float32), target, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return 1000 * np.square((first - warped) / 255).mean(axis=-1)


def mean_where(values, condition):
    return float(values[condition].mean()) if condition.any() else float("nan")


def mean_of_numbers(entries):
    """The mean of what is not nan; nan where nothing is."""
    entries = [entry for entry in entries if not np.isnan(entry)]
    return float(np.mean(entries)) if entries else float("nan")


def average(rows):
    """One {score: value, "frames": n} of those of several videos, each frame of each video counting the same."""
    frames = [row["frames"] for row in rows]
    means = {}
    for name in SCORES:
        pairs = [(row[name], n) for row, n in zip(rows, frames, strict=True) if n and not np.isnan(row[name])]
        total = sum(n for _, n in pairs)
        means[name] = sum(value * n for value, n in pairs) / total if pairs else float("nan")
    return {"frames": sum(frames), **means}


def table(rows):
    """Lines of a small table: `rows` is {name: {"frames": n, score: value}}, SET_SCORES among them or not."""
    width = max(map(len, rows))
    first = next(iter(rows.values()))
    columns = {score: column for score, column in (SCORES | SET_SCORES).items() if score in first}
    lines = [" " * width + "  frames" + "".join(f"{heading:>13}" for heading, _ in columns.values())]
    for name, row in rows.items():
        cells = (f"{row[score]:>13.{decimals}f}" for score, (_, decimals) in columns.items())
        lines.append(f"{name:<{width}}{row['frames']:>8}" + "".join(cells))
    return lines
