"""DAVIS-2017 and YouTube-VOS frames with synthesised masks, and pairs with masks of their own.

Every sample is a function of (seed, epoch, index) alone: neither the number of loader workers nor a resumed run changes
it. Annotations of DAVIS and YouTube-VOS are never read.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from common.errors import InputError
from dataset.folders import scan_davis, scan_ytvos
from dataset.images import read_frames
from dataset.pairs import PairedVideo, draw_window, read_window, scan_pairs
from dataset.utils import FULL_SPAN, fill, random_outlines

PROMPT = "clean background"
DAVIS_OVERSAMPLING = 10  # about 60 DAVIS videos beside 3,471 of YouTube-VOS: 15 % of an epoch instead of 2 %
MIN_HOLE = 0.01  # share of the crop that has to be hole in every frame
MAX_REDRAWS = 1000


@dataclass(frozen=True)
class Clip:
    """One training sample in bytes."""

    frames: np.ndarray  # (f, h, w, 3) uint8, RGB
    holes: np.ndarray  # (f, h, w) uint8, 255 = hole, 0 = keep
    prompt: int  # index into FinetuneDataset.prompts
    noise_seed: int  # everything random that the training step does to this clip follows from it
    video: str
    paths: tuple[Path, ...]  # of the frames, in the clip's order
    conditioning_frames: np.ndarray | None = None  # like frames: shown around the hole, where others
    broken: tuple[str, ...] = ()  # what was wrong with the videos in whose place this one stands

    @property
    def shown_frames(self):
        """(f, h, w, 3) uint8, RGB: what BrushNet sees around the hole."""
        return self.frames if self.conditioning_frames is None else self.conditioning_frames


class FinetuneDataset(Dataset):
    """Random windows of consecutive frames, `args.nframes` long and `args.resolution` square.

    Args:
        args: davis_root, ytvos_root (one of them may be None or empty), nframes, resolution; optional: seed (42),
            prompt ("clean background"), proportion_empty_prompts (0), known_frames (0: share of clips with frames
            that have no hole), mask_span (smallest and largest share of each side of the frame), mask_original_margins
            (False), validation_image (folders of frames that are left out of training), paired_root (None) and
            paired_share (of the clips; without davis_root and ytvos_root an epoch goes through the pairs).
        tokenizer: CLIP tokenizer for `input_ids`; may be None where only `clip` is used.
        broken: {folder: reason} of videos to leave out, as `scan_frames` finds them.

    Raises: InputError for folders that are missing, empty, or hold no video of nframes frames.
    """

    def __init__(self, args, tokenizer=None, broken=None):
        self.nframes, self.resolution = args.nframes, args.resolution
        self.seed = getattr(args, "seed", 42)
        self.proportion_empty_prompts = getattr(args, "proportion_empty_prompts", 0)
        self.known_frames = getattr(args, "known_frames", 0)
        self.mask_span = getattr(args, "mask_span", FULL_SPAN)
        self.mask_original_margins = getattr(args, "mask_original_margins", False)
        self.prompts = (getattr(args, "prompt", PROMPT), "")
        self.tokenizer, broken = tokenizer, broken or {}
        self.epoch = 0

        davis = scan_davis(args.davis_root) if args.davis_root else []
        ytvos = scan_ytvos(args.ytvos_root) if args.ytvos_root else []
        pairs = scan_pairs(args.paired_root) if getattr(args, "paired_root", None) else []
        if not davis and not ytvos and not pairs:
            raise InputError("no dataset was given: set --davis_root, --ytvos_root, --paired_root or several of them")
        self.too_short, self.validation_videos, self.left_out = [], [], []
        held_out = {Path(folder).resolve() for folder in getattr(args, "validation_image", None) or []}
        beside = bool(pairs and (davis or ytvos))  # pairs alone are what an epoch goes through
        self.pairs = self.choose(pairs, "pair", held_out, broken) if beside else []
        self.paired_share = args.paired_share if beside else 0
        chosen = self.choose(davis + ytvos or pairs, "video", held_out, broken)
        oversampled = {video.folder for video in davis}
        times = (DAVIS_OVERSAMPLING if video.folder in oversampled else 1 for video in chosen)
        self.videos = [video for video, count in zip(chosen, times, strict=True) for _ in range(count)]

    def choose(self, videos, what, held_out, broken):
        """Those to train on; the others are counted. Raises InputError where none is left.

        Args:
            held_out: folders, resolved.
        """
        chosen, too_short, validation, left_out = [], [], [], []
        for video in videos:
            if video.broken or video.folder in broken:
                left_out.append(video.broken or broken[video.folder])
            elif held_out.intersection(folder.resolve() for folder in video.folders):
                validation.append(video)
            else:
                (chosen if len(video.frames) >= self.nframes else too_short).append(video)
        if not chosen:
            longest = max(len(video.frames) for video in videos)
            such_as = f" ({left_out[0]})" if left_out else ""
            raise InputError(
                f"no {what} to train on: of {len(videos)} {what}s {len(validation)} are held out for "
                f"validation, {len(left_out)} broken{such_as}, the others have fewer than {self.nframes} frames "
                f"(the longest {what} has {longest}); lower --nframes or add longer {what}s"
            )
        self.too_short += too_short
        self.validation_videos += validation
        self.left_out += left_out
        return chosen

    def __len__(self):
        return len(self.videos)

    def set_epoch(self, epoch):
        """Choose the epoch whose samples `self[index]` returns."""
        self.epoch = epoch

    def __getitem__(self, index):
        """One sample as float tensors.

        Returns: dict of pixel_values (f, 3, h, w) in [-1, 1]; conditioning_pixel_values, the same with the hole at -1
            (black); masks (f, 1, h, w), 1 = keep, 0 = hole; input_ids (n,).
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        clip = self.clip(index, self.epoch)
        frames, holes, shown = (torch.from_numpy(array) for array in (clip.frames, clip.holes, clip.shown_frames))
        pixel_values, conditioning_pixel_values, masks = to_tensors(frames, holes, shown)
        return {
            "pixel_values": pixel_values,
            "conditioning_pixel_values": conditioning_pixel_values,
            "masks": masks,
            "input_ids": tokenize(self.tokenizer, self.prompts[clip.prompt]),
        }

    def clip(self, index, epoch):
        """The sample as bytes: see Clip."""
        video, rng = self.source(index, epoch)
        if isinstance(video, PairedVideo):
            return self.paired_clip(video, rng, epoch, index)
        start = rng.integers(len(video.frames) - self.nframes + 1)
        paths = video.frames[start : start + self.nframes]
        if rng.random() < 0.5:
            paths = paths[::-1]
        source = read_frames(paths)
        crop = Crop.of(*source[0].shape[:2], self.resolution)
        return Clip(
            frames=self.resize(source, crop),
            holes=self.empty_some(self.draw_holes(rng, crop), epoch, index),
            prompt=int(rng.random() < self.proportion_empty_prompts),
            noise_seed=int(rng.integers(2**63)),
            video=video.name,
            paths=tuple(paths),
        )

    def source(self, index, epoch):
        """(the Video or PairedVideo that a sample is of, the rng that the rest of it follows from)."""
        rng = np.random.default_rng([self.seed, epoch, index, 5])
        if self.pairs and rng.random() < self.paired_share:
            return self.pairs[rng.integers(len(self.pairs))], rng
        video = self.videos[index]
        return video, rng if isinstance(video, PairedVideo) else np.random.default_rng([self.seed, epoch, index])

    def paired_clip(self, video, rng, epoch, index):
        """A pair's Clip: its masks are the holes, around which the frames with the object are shown."""
        crop = Crop.of(*video.shape, self.resolution)
        window, holes = draw_window(rng, video, self.nframes, crop)
        frames, shown = (self.resize(source, crop) for source in read_window(video, window))
        had_hole = holes.any(axis=(1, 2))
        holes = self.empty_some(holes, epoch, index)
        emptied = had_hole & ~holes.any(axis=(1, 2))
        shown[emptied] = frames[emptied]  # known frames are those that an earlier pass has cleared
        return Clip(
            frames=frames,
            holes=holes,
            prompt=int(rng.random() < self.proportion_empty_prompts),
            noise_seed=int(rng.integers(2**63)),
            video=video.name,
            paths=tuple(video.frames[i] for i in window),
            conditioning_frames=shown,
        )

    def resize(self, source, crop):
        """(nframes, resolution, resolution, 3) uint8 of whole frames."""
        # Written in place: fresh memory for every frame, and its page faults, would cost as much as the resizing.
        frames = np.empty((self.nframes, self.resolution, self.resolution, 3), np.uint8)
        for image, frame in zip(source, frames, strict=True):
            crop.resize(image, out=frame)
        return frames

    def empty_some(self, holes, epoch, index):
        """The holes (f, h, w), in a share of the clips without those of a few frames, evenly spread.

        As inference's second pass has them, where nframes of a long clip's frames are known: a clip of 2 to nframes
        times that length is drawn, and where the window lies in it.
        """
        rng = np.random.default_rng([self.seed, epoch, index, 2])
        if rng.random() < self.known_frames:
            spacing = rng.uniform(2, self.nframes)
            holes[np.arange(rng.uniform(0, spacing), self.nframes, spacing).astype(int)] = 0
        return holes

    def draw_holes(self, rng, crop):
        """Masks of one shape, drawn in the source frame and scaled to the crop; redrawn while next to none is seen."""
        for _ in range(MAX_REDRAWS):
            outlines = random_outlines(
                rng, self.nframes, crop.height, crop.width, self.mask_span, self.mask_original_margins
            )
            holes = [fill(crop.map_points(outline), self.resolution, self.resolution) for outline in outlines]
            if min(cv2.countNonZero(hole) for hole in holes) >= MIN_HOLE * self.resolution**2:
                return np.stack(holes)
        raise InputError(
            f"{MAX_REDRAWS} masks in a row covered less than {MIN_HOLE:.0%} of the {self.resolution}-pixel crop of a "
            f"{crop.width}x{crop.height} frame: widen --mask_span"
        )


@dataclass(frozen=True)
class Crop:
    """The centre square of a frame, scaled to `resolution`."""

    height: int  # of the source frame
    width: int
    side: int  # of the square, in source pixels
    resolution: int

    @classmethod
    def of(cls, height, width, resolution):
        return cls(height, width, min(height, width), resolution)

    @property
    def corner(self):
        """(x, y) of the square's top-left corner, in source pixels."""
        return (self.width - self.side) // 2, (self.height - self.side) // 2

    def resize(self, frame, out):
        """(height, width, 3) into `out`, (resolution, resolution, 3)."""
        x, y = self.corner
        square = frame[y : y + self.side, x : x + self.side]
        # Bilinear. When shrinking, cv2's bilinear would skip source pixels; areas are averaged then, as PIL does.
        method = cv2.INTER_LINEAR if self.resolution >= self.side else cv2.INTER_AREA
        cv2.resize(square, (self.resolution, self.resolution), dst=out, interpolation=method)

    def resize_hole(self, hole):
        """(height, width) to (resolution, resolution), nearest."""
        x, y = self.corner
        square = hole[y : y + self.side, x : x + self.side]
        return cv2.resize(square, (self.resolution, self.resolution), interpolation=cv2.INTER_NEAREST_EXACT)

    def map_points(self, points):
        """Source pixel coordinates to the crop's; a pixel's centre is at its integer coordinates."""
        return (points - np.array(self.corner) + 0.5) * (self.resolution / self.side) - 0.5


def to_tensors(frames, holes, conditioning_frames=None):
    """Bytes to a training step's tensors, on whatever device they are.

    Args:
        frames: (..., f, h, w, 3) uint8: what is learned.
        holes: (..., f, h, w) uint8, non-zero = hole.
        conditioning_frames: like frames, what is shown around the hole; None: the same.

    Returns: pixel_values (..., f, 3, h, w) in [-1, 1]; conditioning_pixel_values, of the conditioning frames, with the
        hole at -1 (black); masks (..., f, 1, h, w), 1 = keep, 0 = hole.
    """
    pixel_values = to_pixel_values(frames)
    shown = pixel_values if conditioning_frames is None else to_pixel_values(conditioning_frames)
    masks = (holes == 0).unsqueeze(-3).float()
    return pixel_values, torch.where(masks == 0, -1.0, shown), masks


def to_pixel_values(frames):
    """(..., h, w, 3) uint8 to (..., 3, h, w) in [-1, 1]."""
    return frames.movedim(-1, -3).float().div(127.5).sub(1).contiguous()


def tokenize(tokenizer, prompt):
    """(n,) token ids, padded to the text encoder's length."""
    if prompt.encode(errors="ignore").decode() != prompt:
        raise InputError(f"the prompt {prompt!r} is no UTF-8 text")
    tokens = tokenizer(
        prompt, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    )
    return tokens.input_ids[0]
