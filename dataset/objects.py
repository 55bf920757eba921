"""Objects of annotated videos: their shapes as holes in other videos, and their pictures pasted into them.

Annotations are read for shapes only, and only those of videos that may be trained on; never a clip's own, never those
of validation videos. In the masks made here 255 = hole, 0 = keep.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from common.errors import InputError
from dataset.images import (
    BrokenFrame,
    describe_content,
    has_palette,
    image_size,
    list_frames,
    read_bytes,
    read_frames,
    read_mask,
    read_palette,
    size_of,
)
from dataset.mask_kinds import grow, place

VOID = 255  # a palette's label for pixels that the annotators left open
SPAN = (0.2, 0.8)  # share of the frame's side that the larger side of an object's box takes
MIN_AREA = 0.002  # share of its own frame that an object has to have where its track begins
MAX_TRIES = 50  # of videos, before annotations are taken to hold no object
SHORT_OF, BEYOND = -5, 24  # pixels at 512 that a hole falls short of a pasted object, and goes beyond it
LEAST_MARKED = 0.25  # share of a pasted object that its hole covers at least, however short of it the hole falls


@dataclass(frozen=True)
class AnnotatedVideo:
    name: str
    masks: Path  # its folder of masks: labels or one object
    frames: Path | None = None  # its folder of frames, of the masks' names


@contextmanager
def whose_frames(video):
    """A frame that is broken is the AnnotatedVideo's, not the clip's that borrows its object."""
    try:
        yield
    except BrokenFrame as error:
        raise BrokenFrame(str(error), f"annotations of {video.name}") from None


@dataclass(frozen=True)
class Track:
    """An object through a window of its video, scaled and placed as it will be drawn."""

    video: AnnotatedVideo
    paths: tuple[Path, ...]  # of its masks
    label: int  # its value in them
    transform: np.ndarray  # (2, 3): of pixels of its frames to those of the crop

    def masks(self, width, height, soft=False):
        """(f, height, width) uint8: 255 = object; `soft` with shades at its edge, as OpenCV's bilinear makes them."""
        with whose_frames(self.video):
            sources = read_frames(self.paths, read_labels)
        masks = np.empty((len(sources), height, width), np.uint8)
        for labels, mask in zip(sources, masks, strict=True):
            if soft:
                object_mask = cv2.compare(labels, self.label, cv2.CMP_EQ)
                cv2.warpAffine(object_mask, self.transform, (width, height), dst=mask, flags=cv2.INTER_LINEAR)
            else:
                cv2.warpAffine(labels, self.transform, (width, height), dst=mask, flags=cv2.INTER_NEAREST)
                cv2.compare(mask, self.label, cv2.CMP_EQ, dst=mask)
        return masks

    def pictures(self):
        """The frames that belong to the masks, of their size, (h, w, 3) uint8, RGB."""
        with whose_frames(self.video):
            paths = frames_of(self.video, self.paths)
            frames, wanted = read_frames(paths), image_size(self.paths[0])
            if size_of(frames[0]) != wanted:  # else the object would be partly black
                raise BrokenFrame(f"{paths[0]} is {size_of(frames[0])}, its mask {self.paths[0]} {wanted}")
            return frames


class Objects:
    """The objects that clips may borrow.

    Args:
        videos: [AnnotatedVideo].
        excluded: names of videos whose objects never enter.
    """

    def __init__(self, videos, excluded=()):
        self.videos = [video for video in videos if video.name not in set(excluded)]

    def check(self, names, with_frames):
        """Raises InputError where a clip of a video named in `names` would find no other's object, or no masks.

        Args:
            with_frames: objects will be pasted: frames of the masks' names and size are needed.
        """
        usable = [video for video in self.videos if video.frames or not with_frames]
        others = {video.name for video in usable}
        if len(others) < 2 and others <= names:
            wanted = "masks and frames" if with_frames else "masks"
            raise InputError(
                f"objects of other videos were needed, and {len(others)} training video(s) with {wanted} were found: "
                "add the datasets' Annotations/" + ("" if with_frames else ", or --mask_root")
            )
        for video in {video.masks.parent: video for video in reversed(usable)}.values():  # the first of each root
            masks = list_masks(video)
            if with_frames:
                frame = frames_of(video, masks[:1])[0]
                if image_size(frame) != image_size(masks[0]):
                    raise InputError(f"{masks[0]} is {image_size(masks[0])}, its frame {frame} {image_size(frame)}: "
                                     "--paste needs masks of the frames' size")  # fmt: skip

    def draw_track(self, rng, length, height, width, but, leaves=False, with_frames=False):
        """A Track of `length` frames of a random object, its box at a random place, mirrored half the time.

        Args:
            height, width: of the crop it is drawn into.
            but: name of the clip's video, whose own objects are not taken.
            leaves: it may begin up to half outside the frame.
            with_frames: of a video whose frames are known.
        """
        videos = [video for video in self.videos if video.name != but and (video.frames or not with_frames)]
        for _ in range(MAX_TRIES if videos else 0):
            video = videos[rng.integers(len(videos))]
            with whose_frames(video):
                paths = window(rng, list_masks(video), length)
                labels = read_labels(paths[0])
            areas = np.bincount(labels.ravel(), minlength=256)
            areas[0] = 0
            (found,) = np.nonzero(areas >= MIN_AREA * labels.size)
            if found.size:
                label = int(rng.choice(found))
                x, y, w, h = cv2.boundingRect(cv2.compare(labels, label, cv2.CMP_EQ))
                transform = self.draw_transform(rng, (x, y, w, h), height, width, leaves)
                return Track(video, paths, label, transform)
        raise InputError(
            f"{MAX_TRIES} annotations in a row show no object other than {but}'s own: more annotated videos are needed "
            "(--mask_root)"
        )

    def draw_transform(self, rng, bounds, height, width, leaves):
        """(2, 3) that scales and places an object whose box is (x, y, w, h) where its track begins."""
        x, y, w, h = bounds
        scale = rng.uniform(*SPAN) * min(width / w, height / h)
        flip = rng.random() < 0.5
        size = np.array([w, h]) * scale
        left, top = place(rng, 1, np.array([width, height]), size, leaves)[0]
        if flip:
            return np.array([[-scale, 0, left + scale * (x + w)], [0, scale, top - scale * y]])
        return np.array([[scale, 0, left - scale * x], [0, scale, top - scale * y]])


def list_masks(video):
    masks = list_frames(video.masks)
    if not masks:
        raise BrokenFrame(f"{video.masks} holds {describe_content(video.masks)}: a folder of masks was needed")
    return masks


def frames_of(video, masks):
    """The paths of the frames that have the masks' names."""
    by_name = {path.stem: path for path in list_frames(video.frames)}
    missing = [path for path in masks if path.stem not in by_name]
    if missing:
        raise BrokenFrame(f"{video.frames} has no frame for {missing[0]}")
    return [by_name[path.stem] for path in masks]


def window(rng, paths, length):
    """`length` consecutive paths, backwards half the time; of a shorter video forth and back."""
    start = int(rng.integers(max(1, len(paths) - length + 1)))
    if rng.random() < 0.5:
        paths, start = paths[::-1], max(0, len(paths) - length - start)
    around = (*paths, *paths[-2:0:-1])
    return tuple(around[(start + i) % len(around)] for i in range(length))


def read_labels(path):
    """(h, w) uint8: 0 = background, other values one object each; of masks without labels 255.

    Labels are a palette's indices. In one that has its object at 0, the background elsewhere, that object is 255.
    """
    content = read_bytes(path)
    if not has_palette(content):
        return read_mask(path)
    indices, values = read_palette(path, content)
    labels = cv2.LUT(indices, np.where(values > 0, np.arange(256), 0).astype(np.uint8))
    void = labels == VOID
    if void.any() and labels[~void].any():  # alone, 255 is the object of a mask of 0 and 255
        labels[void] = 0
    if values[0]:
        labels[indices == 0] = 255
    return labels


def paste_object(rng, frames, track):
    """(frames with the object pasted in, holes (f, h, w) 255 = hole) for a clip (f, h, w, 3) uint8 without it.

    Its edge is soft. Half the time a shadow is drawn too, for the most part outside the hole. The hole falls short of
    the object, fits it or goes beyond it: what is left outside is to be cleared. Pasted objects as pairs for training:
    https://arxiv.org/abs/2411.16683.
    """
    _, height, width, _ = frames.shape
    unit = min(height, width) / 512
    alphas = track.masks(width, height, soft=True)
    softness = rng.uniform(0.6, 1.5)
    shadow = Shadow.draw(rng, unit) if rng.random() < 0.5 else None
    pasted = frames.copy()
    for frame, source, alpha in zip(pasted, track.pictures(), alphas, strict=True):
        if shadow:
            shadow.cast(frame, alpha)
        part, corner = around(alpha, 4 * softness)  # the rest of a frame stays as it is, which saves half of the time
        weight = cv2.GaussianBlur(alpha[part], (0, 0), softness).astype(np.float32) / 255
        there = track.transform - np.array([[0, 0, corner[0]], [0, 0, corner[1]]])
        picture = cv2.warpAffine(source, there, weight.shape[::-1], flags=cv2.INTER_LINEAR)
        frame[part] = cv2.blendLinear(picture, np.ascontiguousarray(frame[part]), weight, 1 - weight)
    fitting = np.where(alphas > 127, 255, 0).astype(np.uint8)
    holes = grow(fitting, round(rng.uniform(SHORT_OF, BEYOND) * unit))
    # A thin object would lose its hole, and the model would learn to clear what nobody has marked.
    marked = np.count_nonzero(holes) >= LEAST_MARKED * np.count_nonzero(fitting)
    return pasted, holes if marked else fitting


def around(mask, margin):
    """(slices of rows and columns that reach `margin` pixels beyond what is not 0, (x, y) where they begin).

    At least one pixel, where nothing is.
    """
    x, y, w, h = cv2.boundingRect(mask)
    margin = math.ceil(margin)
    left, top = max(0, x - margin), max(0, y - margin)
    return np.s_[top : y + h + margin + 1, left : x + w + margin + 1], (left, top)


@dataclass(frozen=True)
class Shadow:
    """An object's outline laid down on the ground from its foot, blurred, and darker than the ground."""

    lean: float  # pixels to the side, per pixel of the object's height
    length: float  # of the object's height; the shadow lies before it where this is negative
    darkness: float  # 0-1
    blur: float  # sigma, pixels

    @classmethod
    def draw(cls, rng, unit):
        length = rng.uniform(0.15, 0.6) * rng.choice([-1, 1])
        return cls(rng.uniform(-1.5, 1.5), length, rng.uniform(0.3, 0.7), rng.uniform(2, 6) * unit)

    def cast(self, frame, alpha):
        """Darken a frame (h, w, 3) uint8, in place, by the shadow of an object that covers `alpha` (h, w) uint8."""
        rows = np.flatnonzero(alpha.max(axis=1))
        if not rows.size:
            return
        foot = float(rows[-1])
        lay = np.array([[1, -self.lean, self.lean * foot], [0, self.length, foot - self.length * foot]])
        laid = cv2.warpAffine(alpha, lay, alpha.shape[::-1], flags=cv2.INTER_LINEAR)
        part, _ = around(laid, 4 * self.blur)
        shade = 1 - self.darkness / 255 * cv2.GaussianBlur(laid[part], (0, 0), self.blur).astype(np.float32)
        frame[part] = (frame[part] * shade[..., None]).astype(np.uint8)
