"""The part of a frame that a clip shows, and its shape: `--resolution`.

A resolution is written as 512, the side of a square, or '512x288', width x height. A square is always written as one
number, so that equal shapes compare as equal.
"""

import argparse
from dataclasses import dataclass

import cv2
import numpy as np

RESOLUTION_HELP = "width x height of a clip, such as 512x288, in multiples of 8; one number: a square"


def sides(resolution):
    """(width, height) in pixels; raises ValueError for what is no resolution."""
    numbers = [int(side) for side in str(resolution).split("x")]
    width, height = numbers if len(numbers) > 1 else 2 * numbers
    return width, height


def of_sides(width, height):
    """The resolution as it is written."""
    return width if width == height else f"{width}x{height}"


def resolution(text):
    """A flag's text as a resolution."""
    try:
        return of_sides(*sides(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number such as 512, or 512x288, was needed, not {text!r}") from None


def multiples_of_8(resolution):
    """A setting's check: None, or what was needed."""
    nearest = tuple(max(8, round(side / 8) * 8) for side in sides(resolution))
    return None if nearest == sides(resolution) else f"a multiple of 8 was needed; use {of_sides(*nearest)}"


@dataclass(frozen=True)
class Crop:
    """The largest box of a shape in a source frame, scaled to that shape. Pairs are (x, y), lengths in pixels."""

    height: int  # of the source frame
    width: int
    box: tuple[int, int]  # width and height, in the source frame
    corner: tuple[int, int]  # its top left one
    size: tuple[int, int]  # width and height that the box is scaled to

    @classmethod
    def of(cls, height, width, resolution, rng=None):
        """The box in the centre of the frame; with a numpy Generator at a random position.

        Its sides are whole numbers: unless it is a square, its shape is that of `resolution` to within a pixel only.
        """
        size = sides(resolution)
        box = [width, height]
        if width * size[1] > height * size[0]:  # the frame is the wider one: its sides are cut off
            box[0] = max(1, round(height * size[0] / size[1]))
        else:
            box[1] = max(1, round(width * size[1] / size[0]))
        room = np.array([width, height]) - box
        corner = room // 2 if rng is None else rng.integers(room + 1)
        return cls(height, width, tuple(box), tuple(corner.tolist()), size)

    @property
    def scale(self):
        """(2,) pixels of the result per source pixel, in x and y."""
        return np.array(self.size) / self.box

    def resize(self, frame, out, nearest=False):
        """The box of a frame (height, width, 3), or of a mask without channels, into `out` of the crop's size."""
        (x, y), (width, height) = self.corner, self.box
        # Bilinear. When shrinking, cv2's bilinear would skip source pixels; areas are averaged then, as PIL does.
        method = cv2.INTER_NEAREST_EXACT if nearest else cv2.INTER_LINEAR if self.scale.min() >= 1 else cv2.INTER_AREA
        cv2.resize(frame[y : y + height, x : x + width], self.size, dst=out, interpolation=method)

    def resize_all(self, frames):
        """(f, h, w, 3) uint8 of the crop's size, of whole frames."""
        # Written in place: fresh memory for every frame, and its page faults, would cost as much as the resizing.
        resized = np.empty((len(frames), *self.size[::-1], 3), np.uint8)
        for frame, out in zip(frames, resized, strict=True):
            self.resize(frame, out)
        return resized

    def map_points(self, points):
        """Source pixel coordinates to the crop's; a pixel's centre is at its integer coordinates."""
        return (points - np.array(self.corner) + 0.5) * self.scale - 0.5
