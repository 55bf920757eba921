"""How good a filled hole is: PSNR, SSIM and flow-warping error, and what networks say of it (networks.py).

Frames are (f, h, w, 3) uint8 RGB in 0..255; holes (f, h, w) uint8, non-zero = hole. PSNR and SSIM are scikit-image's,
with the settings of the evaluation that ProPainter published (https://github.com/sczhou/ProPainter:
scripts/evaluate_propainter.py, core/metrics.py): frame by frame at a data range of 255, SSIM with a uniform window of
65 pixels on three channels, known pixels pasted back. (Its frames: 432x240.) They are averaged over the frames that
have a hole, of all videos; that evaluation takes all frames, which is the same where its masks leave none without one.
"""

from typing import NamedTuple

import cv2
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from common.run_files import AS_DEPLOYED
from common.threads import in_threads


class Score(NamedTuple):
    heading: str
    unit: str
    decimals: int
    higher_is_better: bool


SSIM_WINDOW = 65  # the largest odd number that fits in smaller frames
SCORES = {  # of a video
    "psnr": Score("PSNR", " dB", 2, True),
    "ssim": Score("SSIM", "", 4, True),
    "warp": Score("E_warp", "", 2, False),
    "psnr_hole": Score("PSNR hole", " dB", 2, True),
    "ssim_hole": Score("SSIM hole", "", 4, True),
    "warp_hole": Score("E_warp hole", "", 2, False),
    "lpips": Score("LPIPS", "", 4, False),
    "lpips_hole": Score("LPIPS hole", "", 4, False),
    "tc": Score("TC", "", 4, True),
    "rc_s": Score("RC-S", "", 4, True),
    "rc_t": Score("RC-T", "", 4, False),
    "psnr_background": Score("PSNR bg", " dB", 2, True),
    "ssim_background": Score("SSIM bg", "", 4, True),
}
PLAIN = ("psnr", "ssim", "warp", "psnr_hole", "ssim_hole", "warp_hole")  # need no network
BACKGROUND = ("psnr_background", "ssim_background")  # need the frames before known pixels are pasted back
BY_VIDEO = ("tc", "rc_s", "rc_t")  # averaged over videos, as published; the others over frames
SET_SCORES = {"vfid": Score("VFID", "", 3, False)}  # of a set of videos, not of one: vfid.py
SMALLEST_FLOW = 16  # pixels: OpenCV's flow crashes in wide frames that are less high
# Where the flow there and back differs by more than this, a pixel is hidden in the other frame (Sundaram, Brox and
# Keutzer: Dense point trajectories by GPU-accelerated large displacement optical flow, ECCV 2010).
OCCLUSION_SLOPE, OCCLUSION_OFFSET = 0.01, 0.5


class Reference:
    """What results for one video are scored against; its motion is found once for all of them.

    Args:
        truth: the true frames; None where an object was removed and nobody knows what is behind it.
        shown: the frames as the methods see them, around the hole; the truth where they are not given.
        networks: of load_networks, whose scores are wanted too.
    """

    def __init__(self, truth, holes, shown=None, networks=()):
        self.truth, self.shown, self.holes, self.networks = truth, truth if shown is None else shown, holes, networks
        self.numbers = np.flatnonzero(holes.any(axis=(1, 2)))  # of the frames that have a hole
        self.motions = list(in_threads(track, truth[:-1], truth[1:])) if truth is not None else []

    def score(self, result, raw=None):
        """{score: mean over the frames that have a hole}, in the order of SCORES; nan where there is nothing to score.

        Args:
            result: the frames to score, known pixels pasted back where the task is to restore.
            raw: the same before pasting; without it the background is not scored.
        """
        names = {*PLAIN, *(BACKGROUND if raw is not None else ())}
        found = list(in_threads(lambda t: self.score_frame(result, raw, t), self.numbers))
        for network in self.networks:
            names.update(network.columns)
            found += network.score(self, result)
        return {name: mean_of_numbers([row.get(name, np.nan) for row in found]) for name in SCORES if name in names}

    def score_frame(self, result, raw, t):
        """{score: value} of frame `t`, which has a hole; the last frame has no warping error."""
        hole, scores = self.holes[t] > 0, {}
        if self.truth is not None:
            truth, (mean, local) = self.truth[t], ssim(self.truth[t], result[t])
            scores = {"psnr": psnr(truth, result[t]), "psnr_hole": psnr(truth[hole], result[t][hole])}
            scores |= {"ssim": mean, "ssim_hole": local[hole].mean()}
        if t < len(self.motions):
            target, visible = self.motions[t]
            error = warping_error(result[t], result[t + 1], target)
            scores |= {"warp": mean_where(error, visible), "warp_hole": mean_where(error, visible & hole)}
        if raw is not None and not hole.all():
            known = self.shown[t] if self.truth is None else self.truth[t]
            scores |= background(known, raw[t], ~hole)
        return scores

    @property
    def scored_frames(self):
        return len(self.numbers)


def background(frame, raw, known):
    """{score: value} over the pixels (h, w) that are `known`; the hole is black in both frames, where SSIM's window
    reaches into it."""
    if np.array_equal(frame[known], raw[known]):  # as plain methods leave it: SSIM would double the time of a score
        return {"psnr_background": float("inf"), "ssim_background": 1.0}
    _, local = ssim(*(picture * known[..., None] for picture in (frame, raw)))
    return {"psnr_background": psnr(frame[known], raw[known]), "ssim_background": local[known].mean()}


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


def measure_words(measure):
    """A score's heading, with how holes were filled, or "held-out loss", of a checkpoint's measure."""
    name, form, _ = measure.partition(AS_DEPLOYED)
    return (SCORES[name].heading if name in SCORES else name.replace("held_out_", "held-out ")) + form.replace("-", " ")


def average(rows):
    """One {score: value, "frames": n} of those of several videos, each frame of each video counting the same, or each
    video (BY_VIDEO). Of scores that at least one of them has; a missing or empty one counts as nan."""
    means = {}
    for name in SCORES:
        found = [(row[name], 1 if name in BY_VIDEO else row["frames"]) for row in rows if row.get(name, "") != ""]
        pairs = [(value, weight) for value, weight in found if weight and not np.isnan(value)]
        total = sum(weight for _, weight in pairs)
        if found:
            means[name] = sum(value * weight for value, weight in pairs) / total if pairs else float("nan")
    return {"frames": sum(row["frames"] for row in rows), **means}


def table(rows):
    """Lines of a small table: `rows` is {name: {"frames": n, score: value}}, whose first one says which scores."""
    width = max(map(len, rows))
    first = next(iter(rows.values()))
    columns = {name: score for name, score in (SCORES | SET_SCORES).items() if name in first}
    lines = [" " * width + "  frames" + "".join(f"{score.heading:>13}" for score in columns.values())]
    for name, row in rows.items():
        cells = (f"{row[column]:>13.{score.decimals}f}" for column, score in columns.items())
        lines.append(f"{name:<{width}}{row['frames']:>8}" + "".join(cells))
    return lines
