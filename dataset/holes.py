"""The holes of a clip: the default shape, other kinds in a mix, a video's own masks, or those of a pasted object.

In the masks made here 255 = hole, 0 = keep; the training tensors turn that round (1 = keep).
"""

from pathlib import Path

import cv2
import numpy as np

from common.errors import InputError
from dataset.folders import list_folders, read_validation_names
from dataset.images import BrokenFrame, describe_content, image_size, list_frames, pair_by_name, read_mask, size_of
from dataset.mask_kinds import DEFAULT_MIX, NO_GROWTH, draw_kind, grow, parse_growth, parse_mix
from dataset.objects import AnnotatedVideo, Objects, paste_object
from dataset.utils import FULL_SPAN, fill, random_outlines

MIN_HOLE = 0.01  # share of the crop: of default shapes in every frame, of others over the clip
MAX_REDRAWS = 1000


class Holes:
    """What `args` say about holes.

    Args:
        args: optional: mask_span (smallest and largest share of each side of the frame), mask_original_margins (False),
            mask_mix ("blob=1"), mask_growth ("0,0": least and most pixels to each side), mask_border (share of clips
            whose hole may leave the frame), paste (share of clips with an object pasted in), mask_root,
            masks_of_videos; davis_root and ytvos_root, whose annotations the objects' shapes come from.
        videos: [Video] to train on.
        excluded: names of videos whose objects must not enter.
    """

    def __init__(self, args, videos, excluded):
        self.span = getattr(args, "mask_span", FULL_SPAN)
        self.original_margins = getattr(args, "mask_original_margins", False)
        self.mix = parse_mix(getattr(args, "mask_mix", DEFAULT_MIX))
        self.growth = parse_growth(getattr(args, "mask_growth", NO_GROWTH))
        self.border = getattr(args, "mask_border", 0)
        self.paste_share = getattr(args, "paste", 0)
        self.own = find_own_masks(getattr(args, "masks_of_videos", None), videos)
        self.objects = None
        if self.mix.get("object") or self.paste_share:
            self.objects = find_objects(args, videos, excluded, with_frames=bool(self.paste_share))

    def sources(self):
        """Names of the videos whose masks holes come from, in the order that draws choose by."""
        borrowed = [f"object of {video.name}" for video in self.objects.videos] if self.objects else []
        return borrowed + [f"masks of {folder.name}" for folder in self.own]

    def draw(self, rng, clip_rng, crop, video, paths, frames):
        """(holes (f, h, w) uint8, conditioning frames (f, h, w, 3) uint8 or None) of a clip.

        Args:
            rng: for all but default shapes.
            clip_rng: the rest of the clip's; default shapes are drawn from it.
            crop: Crop of its frames.
            video, paths: where its frames come from.
            frames: (f, h, w, 3) uint8, cropped.
        """
        width, height = crop.size
        if video.folder in self.own:
            holes = self.read_own(crop, video, paths)
            if holes.any():
                return self.grown(rng, holes), None
        leaves = rng.random() < self.border
        if rng.random() < self.paste_share:
            track = self.objects.draw_track(rng, len(paths), height, width, video.name, leaves, with_frames=True)
            pasted, holes = paste_object(rng, frames, track)
            return holes, pasted
        shares = np.array(list(self.mix.values()))
        kind = rng.choice(list(self.mix), p=shares / shares.sum())
        if kind == "blob" and not leaves:
            return self.grown(rng, self.draw_default(clip_rng, len(paths), crop)), None
        for _ in range(MAX_REDRAWS):
            if kind == "object":
                track = self.objects.draw_track(rng, len(paths), height, width, video.name, leaves)
                holes = track.masks(width, height)
            else:
                span = self.span if kind == "blob" else None  # one that leaves the frame
                holes = draw_kind(rng, kind, len(paths), height, width, leaves, span)
            if np.count_nonzero(holes) >= MIN_HOLE * holes.size:
                return self.grown(rng, holes), None
        raise InputError(f"{MAX_REDRAWS} holes in a row, {kind}, covered less than {MIN_HOLE:.0%} of {width}x{height}")

    def draw_default(self, rng, length, crop):
        """(length, h, w) uint8: one default shape, drawn in the source frame and scaled to the crop. Redrawn while the
        crop shows next to none of it."""
        width, height = crop.size
        for _ in range(MAX_REDRAWS):
            outlines = random_outlines(rng, length, crop.height, crop.width, self.span, self.original_margins)
            holes = [fill(crop.map_points(outline), height, width) for outline in outlines]
            if min(cv2.countNonZero(hole) for hole in holes) >= MIN_HOLE * height * width:
                return np.stack(holes)
        raise InputError(
            f"{MAX_REDRAWS} masks in a row covered less than {MIN_HOLE:.0%} of the {width}x{height} crop of a "
            f"{crop.width}x{crop.height} frame: widen --mask_span"
        )

    def grown(self, rng, holes):
        """Holes that have grown or shrunk by what is drawn for the clip; unchanged where next to none would be left."""
        pixels = int(rng.integers(self.growth[0], self.growth[1] + 1))
        changed = grow(holes, pixels)
        return changed if pixels > 0 or np.count_nonzero(changed) >= MIN_HOLE * changed.size else holes

    def read_own(self, crop, video, paths):
        """The video's own masks (f, h, w) of these frames, cropped as they are."""
        width, height = crop.size
        by_name = {path.stem: path for path in list_frames(self.own[video.folder])}
        holes = np.empty((len(paths), height, width), np.uint8)
        for path, hole in zip(paths, holes, strict=True):
            mask = read_mask(by_name[path.stem])
            if mask.shape != (crop.height, crop.width):
                raise BrokenFrame(f"{by_name[path.stem]} is {size_of(mask)}, {path} {crop.width}x{crop.height}")
            crop.resize(mask, out=hole, nearest=True)
        return holes


def find_own_masks(root, videos):
    """{video's folder: its masks', below `root`} of the videos that have one, every frame with a mask of its size.

    Not by name: a validation video may have a training video's, and must not get its masks.
    """
    if not root:
        return {}
    if not Path(root).is_dir():
        raise InputError(f"{root} is no folder: --masks_of_videos needs one with a folder of masks per video")
    own = {}
    for video in videos:
        if Path(root, video.name).is_dir() and own.setdefault(video.name, video).folder != video.folder:
            raise InputError(f"{own[video.name].folder} and {video.folder} share a name: --masks_of_videos cannot tell "
                             f"whose masks {root}/{video.name} holds; rename one")  # fmt: skip
    if not own:
        raise InputError(
            f"{root} holds {describe_content(root)}, none named as a training video such as {videos[0].name}: "
            "--masks_of_videos needs one folder of masks per video"
        )
    for name, video in own.items():
        frame, mask = pair_by_name(video.folder, Path(root, name), ("the datasets", "--masks_of_videos"))[0]
        if image_size(mask) != image_size(frame):
            raise InputError(f"{mask} is {image_size(mask)}, its frame {frame} {image_size(frame)}: masks of the "
                             "frames' size were needed (--masks_of_videos)")  # fmt: skip
    return {video.folder: Path(root, name) for name, video in own.items()}


def find_objects(args, videos, excluded, with_frames):
    """The Objects that clips may borrow: of the datasets' own annotations, and of --mask_root.

    Args:
        with_frames: some of them must have frames, to be pasted.
    """
    names, found = {video.name for video in videos}, []
    for root, masks, frames in (
        (getattr(args, "davis_root", None), "Annotations/480p", "JPEGImages/480p"),
        (getattr(args, "ytvos_root", None), "Annotations", "JPEGImages"),
    ):
        if root and Path(root, masks).is_dir():
            folders = [folder for folder in list_folders(Path(root, masks)) if folder.name in names]
            found += [AnnotatedVideo(folder.name, folder, Path(root, frames, folder.name)) for folder in folders]
    if root := getattr(args, "mask_root", None):
        if not Path(root).is_dir() or not list_folders(root):
            held = describe_content(root) if Path(root).is_dir() else "nothing: it is no folder"
            raise InputError(f"{root} holds {held}: --mask_root needs a folder of masks per video")
        found += [AnnotatedVideo(folder.name, folder) for folder in list_folders(root)]
        if davis_root := getattr(args, "davis_root", None):  # these may be annotated there
            excluded = {*excluded, *read_validation_names(davis_root)}
    objects = Objects(found, excluded)
    objects.check(names, with_frames)
    return objects
