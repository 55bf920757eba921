"""From a mask to the hole that is filled, and from the generated frames to the result; ours, and as deployed.

Masks and holes are (h, w) uint8, 255 = remove; frames (h, w, 3) uint8 RGB.
"""

import cv2
import numpy as np
from PIL import Image

MASK_DILATIONS = 4  # of object masks: in validation, in davis-removal, and by default in run_diffueraser.py
SQUARE = cv2.getStructuringElement(cv2.MORPH_RECT, (3, 3))
BLUR = (21, 21)  # pixels; OpenCV derives a standard deviation of 3.5 from it


def grow_as_deployed(mask, iterations):
    """Eroded once, which removes specks, and dilated so many times."""
    return cv2.dilate(cv2.erode(mask, SQUARE), SQUARE, iterations=iterations)


def resize_picture(picture, height, width):
    """A frame at another size, smaller by area, larger bilinearly; a mask by nearest, so that it stays binary."""
    if picture.shape[:2] == (height, width):
        return picture
    if picture.ndim == 3:  # where it enlarges, INTER_AREA would repeat pixels
        method = cv2.INTER_AREA if height <= picture.shape[0] else cv2.INTER_LINEAR
    else:  # INTER_NEAREST takes a block's first pixel, not its middle one: masks would move right and down
        method = cv2.INTER_NEAREST_EXACT
    return cv2.resize(picture, (width, height), interpolation=method)


def size_as_deployed(height, width, longest):
    """(height, width) that DiffuEraser works in: the long side `longest` pixels at most, both multiples of 8."""
    ratio = max(1, max(height, width) / longest)
    return int(height / ratio) // 8 * 8, int(width / ratio) // 8 * 8


def resize_as_deployed(picture, height, width):
    """A frame bicubically, a mask by nearest."""
    if picture.shape[:2] == (height, width):
        return picture
    method = Image.Resampling.BICUBIC if picture.ndim == 3 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((width, height), method))


def compose_as_deployed(frame, filled, hole):
    """`filled` in the hole M, fading out around it: its share is 1 - (1 - M)(1 - blurred M), in 8 bits."""
    share = 1 - (1 - hole / 255) * (1 - cv2.GaussianBlur(hole, BLUR, 0) / 255)
    share = (share * 255).astype(np.uint8)[..., None].astype(np.float32) / 255
    return (filled * share + frame * (1 - share)).astype(np.uint8)


def paste_frame(frame, filled, hole, soft_edge):
    """`filled` inside the hole, `frame` outside; over `soft_edge` pixels around the hole one fades into the other."""
    if not soft_edge or not hole.any():
        return np.where(hole[..., None] > 0, filled, frame)
    left, top, width, height = cv2.boundingRect(hole)
    rows = slice(max(0, top - soft_edge), top + height + soft_edge)  # beyond, no pixel changes
    columns = slice(max(0, left - soft_edge), left + width + soft_edge)
    result, known, new = frame.copy(), frame[rows, columns], filled[rows, columns]
    outside = (hole[rows, columns] == 0).astype(np.uint8)
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    share = np.clip(1 - distance / (soft_edge + 1), 0, 1)[..., None]
    result[rows, columns] = np.where(share > 0, share * new + (1 - share) * known, known).round()
    return result


def paste(frames, filled, holes):
    """`filled` inside the holes of a whole clip, `frames` outside: (f, h, w, 3) uint8."""
    return np.where(holes[..., None] > 0, filled, frames)
