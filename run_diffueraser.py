"""Remove an object from a clip of your own with a converted folder.

python run_diffueraser.py --video clip.mp4 --mask mask.mp4 --output_dir results/clip
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.command_line import Parser, at_least, require
from common.errors import InputError, one_line_errors
from common.files import check_writable
from dataset.images import size_of
from libs.inference.load import add_inference_flags, check_inference_flags, load_pipeline
from libs.inference.pipeline import MASK_DILATIONS, paste
from libs.inference.video import dilate, read_masks, read_video, resize, upscale, write_frames, write_mp4

DEFAULT_FPS = 24.0  # of folders of frames
SMALLEST_SIDE = 8  # pixels, one of the latents


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("clip").add_argument
    add("--video", required=True, metavar="PATH", help="a video file, or a folder of .jpg or .png frames")
    add("--mask", required=True, metavar="PATH",
        help="what to remove is white: a video file, a folder of masks, or one image for all frames")  # fmt: skip
    add("--output_dir", required=True, metavar="DIR", help="result.mp4 and frames/ are written there")
    add("--fps", type=float, help=f"frames per second of the result (default: the video's, else {DEFAULT_FPS:g})")
    add("--resolution", type=int, metavar="PX",
        help="shrink a clip whose short side is longer while working: less memory (default: no)")  # fmt: skip
    add("--mask_dilation", type=int, default=MASK_DILATIONS, metavar="PX", help="grow the mask (default: %(default)s)")
    add("--soft_edge", type=int, default=8, metavar="PX",
        help="around the hole, the result fades into the clip over this width (default: %(default)s)")  # fmt: skip
    add_inference_flags(parser)
    return parser


def read_clip(args):
    """(frames (f, h, w, 3), holes (f, h, w), frames per second), of one size and length."""
    require(Path(args.video).resolve() != Path(args.mask).resolve(), f"--mask={args.mask} is the clip itself")
    frames, fps = read_video(args.video)
    holes = read_masks(args.mask)
    if holes.shape[1:] != frames.shape[1:3]:
        raise InputError(f"{args.mask} is {size_of(holes[0])}, {args.video} is {size_of(frames[0])}: masks of the "
                         "clip's size were needed; scale --mask")  # fmt: skip
    if len(holes) == 1:
        holes = np.repeat(holes, len(frames), axis=0)
    if len(holes) != len(frames):
        raise InputError(f"{args.mask} has {len(holes)} masks, {args.video} has {len(frames)} frames: one for each, or "
                         "one for all, was needed")  # fmt: skip
    if not holes.any() or holes.all():
        what = "nothing" if not holes.any() else "every pixel"
        raise InputError(f"{args.mask} marks {what}: white, or any value above 0 in a PNG, is what to remove")
    return frames, dilate(holes, args.mask_dilation), args.fps or fps or DEFAULT_FPS


def remove_object(pipeline, prompt_embeds, frames, holes, args):
    """(f, h, w, 3) uint8: the holes filled, and every pixel that is farther than the soft edge from one untouched.

    The progress bar shows on a terminal only.
    """
    height, width = holes.shape[1:]
    scale = min(1, args.resolution / min(height, width)) if args.resolution else 1
    small = resize(frames, holes, round(height * scale), round(width * scale))
    with tqdm(total=pipeline.count_calls(len(frames)), desc="windows x steps", unit="call", disable=None) as bar:
        filled = pipeline.fill(*small, prompt_embeds, args.seed, progress=bar.update)
    return paste(frames, upscale(filled, height, width), holes, args.soft_edge)


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    at_least(0, args, "mask_dilation", "soft_edge")
    at_least(SMALLEST_SIDE, args, "resolution")
    require(args.fps is None or 0 < args.fps < np.inf, f"--fps={args.fps}: a positive number was needed")
    check_inference_flags(args)
    frames, holes, fps = read_clip(args)
    output_dir = Path(args.output_dir)
    check_writable(output_dir, "--output_dir")
    written = {(output_dir / name).resolve() for name in ("frames", "result.mp4")}
    if written & {Path(args.video).resolve(), Path(args.mask).resolve()}:
        raise InputError(f"--output_dir={args.output_dir}: the result would replace the clip; choose another folder")
    pipeline, prompt_embeds, stage = load_pipeline(args, args.weights)
    print(f"{len(frames)} frames of {size_of(frames[0])}, stage {stage}, {len(pipeline.windows(len(frames)))} windows "
          f"of {min(pipeline.nframes, len(frames))} frames on {pipeline.device.type}")  # fmt: skip
    result = remove_object(pipeline, prompt_embeds, frames, holes, args)
    write_frames(output_dir / "frames", result)
    write_mp4(output_dir / "result.mp4", result, fps)
    print(f"{output_dir / 'result.mp4'} and {output_dir / 'frames'}")


if __name__ == "__main__":
    main()
