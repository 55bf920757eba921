"""DAVIS-2017 and YouTube-VOS frames with synthesised masks, and pairs with masks of their own.

Every sample is a function of (seed, epoch, index) alone: neither the number of loader workers nor a resumed run changes
it. Annotations of DAVIS and YouTube-VOS are read only where holes or pasted objects are to have their shapes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from common.errors import InputError
from dataset.crop import Crop
from dataset.folders import scan_davis, scan_ytvos
from dataset.holes import Holes
from dataset.images import read_frames
from dataset.pairs import DEFAULT_SHARE, PairedVideo, draw_window, read_window, scan_pairs

PROMPT = "clean background"
DAVIS_OVERSAMPLING = 10  # about 60 DAVIS videos among 3,471 of YouTube-VOS: 15 % of an epoch instead of 2 %
# A sample's random generators are seeded by (seed, epoch, index), all but the first with one more number of their own,
# so that one setting leaves the draws of others alone. First: window, default shapes, prompt, noise. 1: replacements of
# broken videos (loader.py). 2: known frames. 3: crop. 4: other holes. 5: pair or not; a pair's window, prompt, noise.


@dataclass(frozen=True)
class Clip:
    """One training sample in bytes."""

    frames: np.ndarray  # (f, h, w, 3) uint8, RGB
    holes: np.ndarray  # (f, h, w) uint8, 255 = hole, 0 = keep
    prompt: int  # index into FinetuneDataset.prompts
    noise_seed: int  # everything random that the training step does to this clip follows from it
    video: str
    paths: tuple[Path, ...]  # of the frames, in the clip's order
    conditioning_frames: np.ndarray | None = None  # like frames: shown around the hole; None: frames themselves
    broken: tuple[str, ...] = ()  # what was wrong with the videos in whose place this one stands

    @property
    def shown_frames(self):
        """(f, h, w, 3) uint8, RGB: what BrushNet sees around the hole."""
        return self.frames if self.conditioning_frames is None else self.conditioning_frames


class FinetuneDataset(Dataset):
    """Random windows of `args.nframes` frames, cropped to the shape of `args.resolution`.

    Args:
        args: davis_root, ytvos_root (one of them may be None or empty), nframes, resolution (512: a square, or
            '512x288'); optional: frame_stride (1: every Nth frame of a video), random_crop (False: the centre), seed
            (42), prompt ("clean background"), proportion_empty_prompts (0), known_frames (0: share of clips with frames
            that have no hole), validation_image (folders of frames that are left out of training), paired_root (None)
            and paired_share (0.3 of the clips; without davis_root and ytvos_root an epoch goes through the pairs), and
            those of Holes.
        tokenizer: CLIP tokenizer for `input_ids`; may be None where only `clip` is used.
        broken: {folder: reason} of videos to leave out, as `scan_frames` finds them.

    Raises: InputError for folders that are missing, empty, or hold no video that is long enough.
    """

    def __init__(self, args, tokenizer=None, broken=None):
        self.nframes, self.resolution = args.nframes, args.resolution
        self.stride, self.span = getattr(args, "frame_stride", 1), frames_spanned(args)
        self.random_crop = getattr(args, "random_crop", False)
        self.seed = getattr(args, "seed", 42)
        self.proportion_empty_prompts = getattr(args, "proportion_empty_prompts", 0)
        self.known_frames = getattr(args, "known_frames", 0)
        self.prompts = (getattr(args, "prompt", PROMPT), "")
        self.tokenizer, broken = tokenizer, broken or {}
        self.epoch = 0

        davis = scan_davis(args.davis_root) if args.davis_root else []
        ytvos = scan_ytvos(args.ytvos_root) if args.ytvos_root else []
        pairs = scan_pairs(args.paired_root) if getattr(args, "paired_root", None) else []
        if not davis and not ytvos and not pairs:
            raise InputError("no dataset was given: set --davis_root, --ytvos_root, --paired_root or several of them")
        self.too_short, self.validation_videos, self.left_out = [], [], []
        excluded = {Path(folder).resolve() for folder in getattr(args, "validation_image", None) or []}
        mixed = bool(pairs and (davis or ytvos))  # pairs alone are what an epoch goes through
        self.pairs = self.choose(pairs, "pair", excluded, broken) if mixed else []
        self.paired_share = getattr(args, "paired_share", DEFAULT_SHARE) if mixed else 0
        chosen = self.choose(davis + ytvos or pairs, "video", excluded, broken)
        oversampled = {video.folder for video in davis}
        times = (DAVIS_OVERSAMPLING if video.folder in oversampled else 1 for video in chosen)
        self.videos = [video for video, count in zip(chosen, times, strict=True) for _ in range(count)]
        self.holes = Holes(args, chosen, {folder.name for folder in excluded})

    def choose(self, videos, what, excluded, broken):
        """Those to train on; the others are counted. Raises InputError where none is left.

        Args:
            excluded: the validation videos' folders, resolved.
        """
        chosen, too_short, validation, left_out = [], [], [], []
        for video in videos:
            if video.broken or video.folder in broken:
                left_out.append(video.broken or broken[video.folder])
            elif excluded.intersection(folder.resolve() for folder in video.folders):
                validation.append(video)
            else:
                (chosen if len(video.frames) >= self.span else too_short).append(video)
        self.too_short += too_short
        self.validation_videos += validation
        self.left_out += left_out
        if not chosen:
            raise InputError(self.why_none(what, videos, len(validation), left_out))
        return chosen

    def why_none(self, what, videos, validation, left_out):
        """The error's text where none of these videos is left to train on."""
        such_as = f" ({left_out[0]})" if left_out else ""
        strided = self.stride > 1
        needed = f", which {self.nframes} take at --frame_stride={self.stride}" if strided else ""
        return (
            f"no {what} to train on: of {len(videos)} {what}s {validation} are held out for validation, "
            f"{len(left_out)} broken{such_as}, the others have fewer than {self.span} frames{needed} (the longest "
            f"{what} has {max(len(video.frames) for video in videos)}); lower --nframes "
            f"{'or --frame_stride ' if strided else ''}or add longer {what}s"
        )

    def __len__(self):
        return len(self.videos)

    def set_epoch(self, epoch):
        """Choose the epoch whose samples `self[index]` returns."""
        self.epoch = epoch

    def __getitem__(self, index):
        """One sample as float tensors.

        Returns: dict of pixel_values (f, 3, h, w) in [-1, 1]; conditioning_pixel_values, of the frames shown around the
            hole, with the hole at -1 (black); masks (f, 1, h, w), 1 = keep, 0 = hole; input_ids (n,).
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
        draw = self.draw_from_pair if isinstance(video, PairedVideo) else self.draw
        paths, frames, holes, conditioning_frames = draw(video, rng, epoch, index)
        known = self.draw_known_frames(epoch, index)
        holes[known] = 0
        if conditioning_frames is not None:
            conditioning_frames[known] = frames[known]  # an earlier pass has cleared them
        return Clip(
            frames=frames,
            holes=holes,
            prompt=int(rng.random() < self.proportion_empty_prompts),
            noise_seed=int(rng.integers(2**63)),
            video=video.name,
            paths=tuple(paths),
            conditioning_frames=conditioning_frames,
        )

    def source(self, index, epoch):
        """(the Video or PairedVideo that a sample is of, the rng that the rest of it follows from)."""
        rng = np.random.default_rng([self.seed, epoch, index, 5])
        if self.pairs and rng.random() < self.paired_share:
            return self.pairs[rng.integers(len(self.pairs))], rng
        video = self.videos[index]
        return video, rng if isinstance(video, PairedVideo) else np.random.default_rng([self.seed, epoch, index])

    def draw(self, video, rng, epoch, index):
        """(paths of the frames, frames (f, h, w, 3), holes (f, h, w), conditioning frames or None) of a clip."""
        start = rng.integers(len(video.frames) - self.span + 1)
        paths = video.frames[start : start + self.span : self.stride]
        if rng.random() < 0.5:
            paths = paths[::-1]
        source = read_frames(paths)
        crop = self.draw_crop(*source[0].shape[:2], epoch, index)
        frames = crop.resize_all(source)
        hole_rng = np.random.default_rng([self.seed, epoch, index, 4])
        return paths, frames, *self.holes.draw(hole_rng, rng, crop, video, paths, frames)

    def draw_from_pair(self, video, rng, epoch, index):
        """The same of a pair: its masks are the holes, around which the frames with the object are shown."""
        crop = self.draw_crop(*video.shape, epoch, index)
        window, holes = draw_window(rng, video, self.span, self.stride, crop)
        frames, shown = map(crop.resize_all, read_window(video, window))
        hole_rng = np.random.default_rng([self.seed, epoch, index, 4])
        return [video.frames[i] for i in window], frames, self.holes.grown(hole_rng, holes), shown

    def draw_crop(self, height, width, epoch, index):
        """The Crop of frames of that size, in their centre unless told otherwise."""
        # A generator of its own: the window, and masks that need no redrawing, are those of the centre's crop.
        rng = np.random.default_rng([self.seed, epoch, index, 3]) if self.random_crop else None
        return Crop.of(height, width, self.resolution, rng)

    def draw_known_frames(self, epoch, index):
        """Numbers of a clip's frames that have no hole: in a share of the clips a few, evenly spread.

        As inference's second pass has them, where nframes of a long clip's frames are known: a clip of 2 to nframes
        times that length is drawn, and where the window lies in it.
        """
        rng = np.random.default_rng([self.seed, epoch, index, 2])
        if rng.random() >= self.known_frames:
            return np.array([], int)
        spacing = rng.uniform(2, self.nframes)
        return np.arange(rng.uniform(0, spacing), self.nframes, spacing).astype(int)


def frames_spanned(args):
    """How many consecutive frames of a video a clip reaches over."""
    return (args.nframes - 1) * getattr(args, "frame_stride", 1) + 1


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
