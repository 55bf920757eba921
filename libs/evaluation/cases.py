"""Clips whose truth is known: an object to remove, or known content to restore; and how close a filled clip comes.

Frames are (f, h, w, 3) uint8 RGB; holes (f, h, w) uint8, 255 = hole.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import cv2
import numpy as np

from dataset.crop import Crop
from dataset.holes import Holes
from dataset.images import read_frames
from libs.evaluation.metrics import Reference, Score, psnr

TASKS = {  # settings of Holes; objects are those of the other videos that are scored, so that none was trained on
    # Pasted in, half of the time with a shadow. The hole falls short of the object, fits it or goes beyond it.
    "removal": {"paste": 1.0},
    "guide's holes": {},
    "other holes": {"mask_mix": "box=0.2,ellipse=0.1,stroke=0.2,text=0.2,several=0.1,object=0.2"},
}
SCORES = {
    "psnr_hole": Score("PSNR in the hole", " dB", 2, True),
    "psnr_ring": Score("PSNR around it", " dB", 2, True),
    "psnr_left": Score("PSNR of outlines and shadows", " dB", 2, True),
    "warp_hole": Score("warping error in the hole", "", 2, False),
    "rim": Score("step across the rim", "", 2, False),
}
RING = 48 / 512  # of the frame's shorter side: how far "around" the hole reaches
CHANGED = 8  # of 255: what a pasted object changes by more, outside the hole, is left to be cleared


@dataclass(frozen=True)
class Case:
    task: str
    video: str
    truth: np.ndarray
    shown: np.ndarray  # what the model sees around the hole: the truth, or the clip with an object
    holes: np.ndarray

    def score(self, filled):
        """{score: value}, the names as in SCORES, of a model's whole frames; nan where there is nothing to score.

        Where content is restored, known pixels are pasted back, and the hole alone is scored. Where an object is
        removed they are not, as the surroundings hold what is left of it.
        """
        inside = self.holes > 0
        result = filled if self.task == "removal" else np.where(inside[..., None], filled, self.truth)
        around = outside = np.zeros_like(inside)
        if self.task == "removal":
            around = ring(self.holes) & ~inside
            outside = ~inside & (cv2.absdiff(self.shown, self.truth).max(axis=-1) > CHANGED)
        scores = Reference(self.truth, self.holes).score(result)
        return {
            "psnr_hole": scores["psnr_hole"],
            "psnr_ring": psnr_where(self.truth, result, around),
            "psnr_left": psnr_where(self.truth, result, outside),
            "warp_hole": scores["warp_hole"],
            "rim": rim_error(self.truth, result, inside),
        }


def make_cases(task, davis_root, videos, resolution, length):
    """Yield a Case of every Video: its first frames, at most `length`, with holes that follow from its number.

    Args:
        task: of TASKS.
        davis_root: whose annotations hold the objects of these videos.
        resolution: the shape that frames are cropped to, such as "112x64".
    """
    holes = Holes(SimpleNamespace(davis_root=davis_root, **TASKS[task]), videos, excluded=())
    for number, video in enumerate(videos):
        rng, paths = np.random.default_rng([0, number]), video.frames[:length]
        source = read_frames(paths)
        crop = Crop.of(*source[0].shape[:2], resolution)
        truth = crop.resize_all(source)
        drawn, shown = holes.draw(rng, rng, crop, video, paths, truth)
        yield Case(task, video.name, truth, truth if shown is None else shown, drawn)


def noise_seed(seed, number):
    """The seed of a video's noise. Stage 1 starts all frames from one noise: were it all videos' too, each seed would
    be a sample of one."""
    return seed + 1000 * number


def ring(holes):
    """(f, h, w) bool: the holes and what lies within RING of them."""
    pixels = max(1, round(RING * min(holes.shape[1:])))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1,) * 2)
    return np.stack([cv2.dilate(hole, disc) for hole in holes]) > 0


def psnr_where(truth, result, where):
    """PSNR in dB over the pixels of a clip where `where` (f, h, w) is true; nan where none is."""
    return psnr(truth[where], result[where]) if where.any() else float("nan")


def rim_error(truth, result, inside):
    """How much the steps from hole to surroundings differ from the truth's: the mean, 0-255, over neighbouring pixels
    of which one is `inside` (f, h, w); nan where there are none. A visible seam has steps that the truth has not."""
    differences = []
    for axis in (1, 2):
        across = np.diff(inside, axis=axis)
        step, true_step = (np.diff(frames.astype(np.int16), axis=axis)[across] for frames in (result, truth))
        differences.append(np.abs(step - true_step).ravel())
    differences = np.concatenate(differences)
    return float(differences.mean()) if differences.size else float("nan")
