"""README's picture: a training sample, as the dataset makes it from a drawn video, and where its parts go.

python -m toy.make_picture --output docs/images/training.png
"""

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPTokenizer

from dataset.finetune_dataset import FinetuneDataset
from toy.make_weights import write_tokenizer

SIZE, SCALE, FINER = (880, 440), 2, 2  # in units; pixels per unit; drawn finer than that and scaled down
THUMB, GAP, LEFT, ROWS = 88, 6, 20, (38, 158, 278)
INK, GREY, LINE, PAPER = "#24292f", "#57606a", "#8c959f", "#ffffff"
SPATIAL, MOTION, FROZEN = "#ffb77c", "#85d6a0", "#d8dee4"
LABELS = (
    "frames: what training starts from",
    "masked frames: what BrushNet sees of them",
    "mask: 0 (black) = hole, 1 (white) = keep",
)
STAGE_1 = "stage 1 trains UNet and BrushNet, 1.75 billion parameters, on 10 frames, each by itself"
STAGE_2 = "stage 2 trains the motion modules alone, 0.45 billion, on 22 frames together; the rest is frozen"
SEED, NFRAMES, SHOWN = 22, 10, (0, 3, 6, 9)


def draw_scene(t, height=480, width=854):
    """Frame t of a balloon over hills, (height, width, 3) uint8 RGB: flat colours, which a PNG packs well."""
    frame = np.full((height, width, 3), (190, 227, 245), np.uint8)
    cv2.circle(frame, (560 - t, 105), 46, (255, 214, 112), -1, cv2.LINE_AA)
    x = np.arange(-10, width + 10, 4)
    hills = ((300, 60, 150, (143, 177, 209)), (350, 45, 95, (101, 157, 150)), (420, 30, 130, (67, 124, 96)))
    for depth, (level, rise, wavelength, colour) in enumerate(hills):
        pan = t * (2 + 3 * depth)
        y = level - rise * np.sin((x + pan) / wavelength) - rise / 2 * np.cos((x + pan) / wavelength * 2.3 + depth)
        corners = [(width + 10, height), (-10, height)]
        cv2.fillPoly(frame, [np.int32([*zip(x, y, strict=True), *corners])], colour, cv2.LINE_AA)
    cx, cy = 300 + 14 * t, 215 - 5 * t
    for half, colour in ((62, (214, 73, 63)), (40, (247, 238, 220)), (18, (214, 73, 63))):
        cv2.ellipse(frame, (cx, cy), (half, 70), 0, 0, 360, colour, -1, cv2.LINE_AA)
    for side in (-1, 1):
        cv2.line(frame, (cx + 30 * side, cy + 58), (cx + 12 * side, cy + 98), (110, 74, 46), 2, cv2.LINE_AA)
    cv2.rectangle(frame, (cx - 14, cy + 98), (cx + 14, cy + 118), (139, 94, 60), -1)
    return frame


def load_sample():
    """What the training reads of such a video: FinetuneDataset's tensors, 512 pixels square."""
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder, "JPEGImages/balloon")
        video.mkdir(parents=True)
        for t in range(NFRAMES):
            Image.fromarray(draw_scene(t)).save(video / f"{t:05d}.png")
        write_tokenizer(Path(folder, "tokenizer"))
        args = SimpleNamespace(davis_root=None, ytvos_root=folder, nframes=NFRAMES, resolution=512, seed=SEED)
        return FinetuneDataset(args, CLIPTokenizer.from_pretrained(Path(folder, "tokenizer")))[0]


class Drawing:
    """PIL's drawing calls in units instead of pixels."""

    def __init__(self):
        self.zoom = SCALE * FINER
        self.image = Image.new("RGB", [side * self.zoom for side in SIZE], PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=13, colour=INK, anchor="lm"):
        font = ImageFont.load_default(size * self.zoom)
        place = x * self.zoom, y * self.zoom
        self.draw.text(place, text, colour, font, anchor, align="center", spacing=3 * self.zoom)

    def box(self, x, y, width, height, fill, text="", size=13, outline=None):
        corners = [side * self.zoom for side in (x, y, x + width, y + height)]
        self.draw.rounded_rectangle(corners, 6 * self.zoom, fill, outline, round(1.4 * self.zoom))
        self.text(x + width / 2, y + height / 2, text, size, anchor="mm")

    def arrow(self, *points, colour=GREY):
        """A line through `points`, each (x, y), with a head at the last."""
        points = np.array(points, float)
        along = (points[-1] - points[-2]) / np.linalg.norm(points[-1] - points[-2])
        across = np.array([-along[1], along[0]])
        tip, base = points[-1], points[-1] - 8 * along
        line = [*points[:-1], base]
        self.draw.line([tuple(p * self.zoom) for p in line], colour, round(1.6 * self.zoom), joint="curve")
        self.draw.polygon([tuple(p * self.zoom) for p in (tip, base + 4 * across, base - 4 * across)], colour)


def draw_diagram():
    """The picture without its thumbnails."""
    d = Drawing()
    for y, label in zip(ROWS, LABELS, strict=True):
        d.text(LEFT, y - 13, label)
    end = LEFT + 4 * THUMB + 3 * GAP
    frames, masked, mask = (y + THUMB / 2 for y in ROWS)
    for y, text in ((frames, "VAE\nencoder"), (masked, "VAE\nencoder"), (mask, "scaled to\nlatents")):
        d.arrow((end + 4, y), (438, y))
        d.box(440, y - 23, 72, 46, FROZEN, text)
    d.arrow((512, frames), (541, frames))
    d.box(543, frames - 23, 66, 46, PAPER, "+ noise at\ntimestep t", 11, outline=LINE)
    d.arrow((609, frames), (648, frames))
    d.arrow((512, masked), (648, masked))
    d.arrow((512, mask), (600, mask), (600, masked + 20), (648, masked + 20))
    d.arrow((628, frames), (628, masked - 20), (648, masked - 20))
    d.box(650, frames - 38, 116, 76, SPATIAL)
    d.text(708, frames - 20, "UNet", 14, anchor="mm")
    d.box(664, frames - 4, 88, 32, MOTION, "motion modules\n(stage 2)", 11)
    d.box(650, masked - 38, 116, 76, SPATIAL, "BrushNet", 14)
    d.arrow((708, masked - 38), (708, frames + 40))
    d.text(716, (frames + masked) / 2, "added to\nevery layer", 11, GREY)
    d.arrow((766, frames), (794, frames))
    d.text(800, frames, "predicted\nnoise", 12)
    d.text(650, mask - 18, "loss: mean squared error between", 12, GREY)
    d.text(650, mask, "predicted noise and the added noise", 12, GREY)
    for y, colour, text in ((398, SPATIAL, STAGE_1), (420, MOTION, STAGE_2)):
        d.box(LEFT, y - 8, 26, 16, colour)
        d.text(LEFT + 36, y, text)
    return d.image.resize([side * SCALE for side in SIZE], Image.Resampling.LANCZOS)


def make_picture(output):
    sample = load_sample()
    masks = sample["masks"].expand(-1, 3, -1, -1) * 2 - 1
    picture = draw_diagram()
    for y, row in zip(ROWS, (sample["pixel_values"], sample["conditioning_pixel_values"], masks), strict=True):
        for column, t in enumerate(SHOWN):
            thumb = Image.fromarray(row[t].add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy())
            thumb = thumb.resize((THUMB * SCALE, THUMB * SCALE), Image.Resampling.LANCZOS)
            place = (LEFT + column * (THUMB + GAP)) * SCALE, y * SCALE
            picture.paste(thumb, place)
            edge = [place[0], place[1], place[0] + THUMB * SCALE - 1, place[1] + THUMB * SCALE - 1]
            ImageDraw.Draw(picture).rectangle(edge, outline=LINE)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/images/training.png")
    make_picture(parser.parse_args().output)
