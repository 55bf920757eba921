"""The clips that an evaluation's page plays: a small H.264 file per video, with all methods in step to the frame.

A file holds a tile per method below the input's (in columns where it would become too high), which the page puts
together: the input's pixels, and over them, inside a region, a method's. The region holds every pixel that some method
changed; elsewhere a method's tile is grey and costs no bits.
"""

import math
from pathlib import Path

import cv2
import numpy as np

from common.files import write_json, written_whole
from dataset.mask_kinds import grow
from libs.inference.composition import resize_picture
from libs.inference.video_file import VideoWriter

CLIPS = "clips"  # their folder in an evaluation's
LONGEST_SIDE = 480  # pixels: larger frames are made smaller
CLIP_BYTES = 265_000  # of a file: 50 of them, in base64, and the rest of a page are under 20 MB
BEST_CRF, WORST_CRF = 22, 38  # a clip that is larger at the worst stays so
BLOCK = 16  # pixels of H.264's macroblock: tiles begin at multiples, so that none bleeds into the next
HIGHEST = 4096  # pixels that decoders in hardware take
BORDER = 3  # pixels that a region goes beyond what changed: codecs smear
GREY = 128


def save_clips(output_dir, video, shown, holes, results, fps):
    """Write clips/<video>.mp4, and clips/<video>.json, which describes it, once that is whole.

    Args:
        shown: (f, h, w, 3) uint8 RGB, what a method sees around the hole; inside it what was there, where it is known.
        holes: (f, h, w) uint8, non-zero = hole.
        results: {method: (f, h, w, 3) uint8 RGB}. Where known pixels are not pasted back, a clip of as many bytes is
            worse. The truth may be among them, where it is not what is shown. Their tiles have this order; a result
            that is what is shown gets none.
    """
    folder = Path(output_dir, CLIPS)
    folder.mkdir(parents=True, exist_ok=True)
    methods = [name for name in results if (results[name] != shown).any()]
    height, width = small_size(*holes.shape[1:])
    changed = holes > 0
    grown_holes = grow([shrink_mask(hole, height, width) for hole in changed], BORDER)
    for name in methods:
        changed |= (results[name] != shown).any(axis=-1)
    regions = grow([shrink_mask(mask, height, width) for mask in changed], BORDER)
    tiles = Tiles(height, width, [shown, *(results[name] for name in methods)], regions)
    with written_whole(folder / f"{video}.mp4") as partial:
        encode(partial, tiles, fps)
    hole_paths, region_paths = ([outline(mask) for mask in masks] for masks in (grown_holes, regions))
    paths = list(dict.fromkeys(hole_paths + region_paths))
    write_json(folder / f"{video}.json", {
        "width": width, "height": height, "frames": len(shown), "fps": fps, "methods": methods,
        "tile": [tiles.tile_width, tiles.tile_height], "rows": tiles.rows, "paths": paths,
        "outlines": [paths.index(path) for path in hole_paths], "regions": [paths.index(path) for path in region_paths],
    })  # fmt: skip


def small_size(height, width):
    """(height, width) of a clip's frames, at most LONGEST_SIDE."""
    scale = min(1, LONGEST_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def shrink_mask(mask, height, width):
    """(height, width) uint8 0 or 255: 255 where any pixel of the larger bool mask is true."""
    covered = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return np.where(covered > 0, np.uint8(255), np.uint8(0))


class Tiles:
    """The pictures of a file, (height, width, 3) uint8 RGB, made one at a time: what is encoded again is not kept."""

    def __init__(self, height, width, clips, regions):
        """
        Args:
            height, width: of a clip's frame as it is shown.
            clips: [(f, h, w, 3) uint8 RGB], the input first.
            regions: (height, width) uint8 per frame, 255 where a method's tile is not grey.
        """
        self.frame_height, self.frame_width, self.clips, self.regions = height, width, clips, regions
        self.tile_height, self.tile_width = (math.ceil(side / BLOCK) * BLOCK for side in (height, width))
        self.rows = min(len(clips), max(1, HIGHEST // self.tile_height))
        columns = math.ceil(len(clips) / self.rows)
        self.height, self.width = self.rows * self.tile_height, columns * self.tile_width

    def __iter__(self):
        """Frame by frame; a column of tiles is filled before the next one."""
        for t, region in enumerate(self.regions):
            picture = np.full((self.height, self.width, 3), GREY, np.uint8)
            kept = self.whole_blocks(grow([region], BORDER)[0])[..., None]  # beyond the region: chroma is half as fine
            for number, clip in enumerate(self.clips):
                column, row = divmod(number, self.rows)
                top, left = row * self.tile_height, column * self.tile_width
                tile = self.fill_up(resize_picture(clip[t], self.frame_height, self.frame_width))
                area = picture[top : top + self.tile_height, left : left + self.tile_width]
                area[:] = tile if number == 0 else np.where(kept, tile, GREY)
            yield picture

    def fill_up(self, picture):
        """A picture of a tile's size: the last row and column go on."""
        missing = self.tile_height - picture.shape[0], self.tile_width - picture.shape[1]
        return np.pad(picture, [(0, missing[0]), (0, missing[1]), (0, 0)][: picture.ndim], "edge")

    def whole_blocks(self, region):
        """(tile's height, tile's width) bool: the macroblocks that hold any of a region."""
        filled = self.fill_up(region)
        rows, columns = (side // BLOCK for side in filled.shape)
        blocks = filled.reshape(rows, BLOCK, columns, BLOCK).any(axis=(1, 3))
        return blocks.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


def encode(path, tiles, fps):
    """Write the pictures at the best quality that CLIP_BYTES allow."""
    crf = BEST_CRF
    while True:
        with VideoWriter(path, tiles.height, tiles.width, fps, crf=crf) as writer:
            for picture in tiles:
                writer.write(picture)
        size = path.stat().st_size
        if size <= CLIP_BYTES or crf == WORST_CRF:
            return
        crf = min(WORST_CRF, crf + max(1, round(6 * math.log2(size / CLIP_BYTES))))  # 6 more halve a file


def outline(region):
    """A region's border as an SVG path in pixels, to be filled by the even-odd rule; "" for an empty one."""
    contours, _ = cv2.findContours(region, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return "".join(as_path(cv2.approxPolyDP(contour, 1, closed=True)[:, 0]) for contour in contours)


def as_path(points):
    """(n, 2) integers as "Mx ylx y x y...z", each point relative to the last."""
    (x, y), steps = points[0], np.diff(points, axis=0).ravel()
    return f"M{x} {y}l{' '.join(map(str, steps))}z"
