"""Small moving scenes in DAVIS's and YouTube-VOS's folder layouts: drifting shapes before a panning background, whose
soft colours and waves go on behind them, so that what a hole hides can be guessed from around it.

python -m toy.make_videos --output_dir toy/data
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from common.command_line import Parser, require
from common.errors import one_line_errors
from common.files import is_filled

HEIGHT, WIDTH, FRAMES = 96, 160, 26
DAVIS_TRAIN = ("kites", "marbles", "balloons", "leaves")
DAVIS_VAL = ("buoy", "lantern")
YTVOS = ("0a1b2c3d4e", "1b2c3d4e5f", "2c3d4e5f6a", "3d4e5f6a7b")
PALETTE = [0, 0, 0, 128, 0, 0]  # DAVIS's first two colours: background and the first object


def make_videos(output_dir, seed=0, more=0, held_out=0):
    """Write `output_dir`/DAVIS (4 training videos, 2 and `held_out` for validation) and /YTBV (4 and `more`).

    All have annotations: the nearest shape. Raises: InputError where there are other videos, whose lists would be lost.
    """
    rng = np.random.default_rng(seed)
    davis, ytvos = Path(output_dir, "DAVIS"), Path(output_dir, "YTBV")
    lists = davis / "ImageSets/2017"
    train, val = lists / "train.txt", lists / "val.txt"
    drawn = train.is_file() and train.read_text().split() == list(DAVIS_TRAIN)
    for folder in (davis, ytvos):
        require(
            drawn or not is_filled(folder),
            f"{folder} was not drawn here, or not to its end: remove it, or choose another --output_dir",
        )
    in_ytvos, held_out = [f"{i:010x}" for i in range(more)], [f"held-out-{i}" for i in range(held_out)]
    lists.mkdir(parents=True, exist_ok=True)
    train.write_text("\n".join(DAVIS_TRAIN) + "\n")  # first, as it tells whose videos these are
    val.write_text("\n".join([*DAVIS_VAL, *held_out]) + "\n")
    for name in DAVIS_TRAIN + DAVIS_VAL:
        write_video(davis, "480p", name, *make_scene(rng))
    for name in (*YTVOS, *in_ytvos):
        write_video(ytvos, "", name, *make_scene(rng), name_step=5)
    for name in held_out:  # last, so that the others are the same without them
        write_video(davis, "480p", name, *make_scene(rng))


def make_scene(rng):
    """(frames, masks): FRAMES x (h, w, 3) uint8 RGB, and (h, w) bool of the nearest shape."""
    colours = rng.uniform(40, 215, (2, 5, 3)).astype(np.float32)
    background = cv2.resize(colours, (2 * WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:HEIGHT, : 2 * WIDTH]
    angle, wavelength = rng.uniform(0, np.pi), rng.uniform(12, 48)
    waves = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength)
    background = np.clip(background + waves[..., None] * rng.uniform(-40, 40, 3), 0, 255)
    pan = rng.uniform(0.5, 2)
    shapes = [
        {
            "centre": rng.uniform((20, 20), (WIDTH - 20, HEIGHT - 20)),
            "velocity": rng.uniform(-2, 2, 2),
            "axes": rng.integers(8, 22, 2).tolist(),
            "turn": rng.uniform(-6, 6),
            "colour": rng.integers(0, 256, 3).tolist(),
        }
        for _ in range(3)
    ]
    frames, masks = [], []
    for t in range(FRAMES):
        start = int(pan * t)
        frame = background[:, start : start + WIDTH].astype(np.uint8).copy()
        for shape in shapes:
            x, y = (shape["centre"] + t * shape["velocity"]).round().astype(int).tolist()
            ellipse = ((x, y), shape["axes"], shape["turn"] * t, 0, 360)
            cv2.ellipse(frame, *ellipse, shape["colour"], -1, cv2.LINE_AA)
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        cv2.ellipse(mask, *ellipse, 1, -1)
        frames.append(frame)
        masks.append(mask > 0)
    return frames, masks


def write_video(root, size, name, frames, masks, name_step=1):
    """JPEGs, and palette PNGs as both datasets have them: 0 = background, 1 = object."""
    pictures, annotations = root / "JPEGImages" / size / name, root / "Annotations" / size / name
    pictures.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(parents=True, exist_ok=True)
    for i, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        Image.fromarray(frame).save(pictures / f"{i * name_step:05d}.jpg", quality=95)
        image = Image.fromarray(mask.astype(np.uint8), mode="P")
        image.putpalette(PALETTE)
        image.save(annotations / f"{i * name_step:05d}.png")


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", default="toy/data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", type=int, default=0, metavar="N", help="N more training videos in YTBV")
    parser.add_argument("--held_out", type=int, default=0, metavar="N", help="N more validation videos in DAVIS")
    options = parser.parse_args(argv)
    make_videos(options.output_dir, options.seed, options.more, options.held_out)


if __name__ == "__main__":
    main()
