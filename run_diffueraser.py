"""Remove an object from a clip of your own with a converted folder.

python run_diffueraser.py --video clip.mp4 --mask mask.mp4 --output_dir results/clip
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.command_line import Parser, at_least, require
from common.errors import InputError, one_line_errors
from common.files import check_writable, note_own, refuse_foreign
from libs.inference.load import add_inference_flags, check_inference_flags, load_pipeline
from libs.inference.pipeline import MASK_DILATIONS, paste
from libs.inference.video import dilate, open_masks, open_video, resize, upscale, write_image
from libs.inference.video_file import DEFAULT_FPS, VideoWriter

RESULTS = ("frames", "result.mp4")
SMALLEST_SIDE = 8  # pixels, one of the latents


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("clip").add_argument
    add("--video", required=True, metavar="PATH", help="a video file, a folder of frames, or an image")
    add("--mask", required=True, metavar="PATH",
        help="what to remove is white: a video file, a folder of masks, or one image for all frames")  # fmt: skip
    add("--output_dir", required=True, metavar="DIR", help="result.mp4 and frames/ are written there")
    add("--fps", type=float,
        help=f"an even rate, without sound (default: the video's own times, else {DEFAULT_FPS:g})")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a frames/ or result.mp4 that no earlier result made")
    add("--resolution", type=int, metavar="PX",
        help="shrink a clip whose short side is longer while working: less memory (default: no)")  # fmt: skip
    add("--mask_dilation", type=int, default=MASK_DILATIONS, metavar="PX", help="grow the mask (default: %(default)s)")
    add("--soft_edge", type=int, default=8, metavar="PX",
        help="around the hole, the result fades into the clip over this width (default: %(default)s)")  # fmt: skip
    add_inference_flags(parser)
    return parser


def open_clip(args):
    """The clip and its masks, of one size and length; both are read to their ends, and held nowhere."""
    require(Path(args.video).resolve() != Path(args.mask).resolve(), f"--mask={args.mask} is the clip itself")
    video, masks = open_video(args.video), open_masks(args.mask)
    sizes = [f"{clip.width}x{clip.height}" for clip in (masks, video)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{args.mask} is {sizes[0]}, {args.video} is {sizes[1]}: masks of the clip's size were needed; scale --mask"
        )
    if len(masks) not in (1, len(video)):
        raise InputError(f"{args.mask} has {len(masks)} masks, {args.video} has {len(video)} frames: one for each, or "
                         "one for all, was needed")  # fmt: skip
    if max(masks.shares) == 0 or min(masks.shares) == 1:
        what = "nothing" if max(masks.shares) == 0 else "every pixel"
        raise InputError(f"{args.mask} marks {what}: white, or any value above 0 in a PNG, is what to remove")
    return video, masks


def read_clip(video, masks, args):
    """Yield (frame (1, h, w, 3), hole (1, h, w)), the hole dilated."""
    for frame, hole in zip(video.frames(), masks.frames(len(video)), strict=True):
        yield frame[None], dilate(hole[None], args.mask_dilation)


def read_small(video, masks, args):
    """The whole clip at the size that it is worked on: (frames (f, h, w, 3), holes (f, h, w))."""
    scale = min(1, args.resolution / min(video.height, video.width)) if args.resolution else 1
    height, width = round(video.height * scale), round(video.width * scale)
    frames, holes = np.empty((len(video), height, width, 3), np.uint8), np.empty((len(video), height, width), np.uint8)
    for i, (frame, hole) in enumerate(read_clip(video, masks, args)):
        frames[i : i + 1], holes[i : i + 1] = resize(frame, hole, height, width)
    return frames, holes


def fill(pipeline, prompt_embeds, frames, holes, args):
    """(f, h, w, 3) uint8: the generated frames. The progress bar shows on a terminal only."""
    with tqdm(total=pipeline.count_calls(len(frames)), desc="windows x steps", unit="call", disable=None) as bar:
        return pipeline.fill(frames, holes, prompt_embeds, args.seed, progress=bar.update)


def paste_all(video, masks, filled, args):
    """Yield the clip's own frames (h, w, 3) with their holes filled; every pixel that is farther than the soft edge
    from a hole is the clip's."""
    for (frame, hole), new in zip(read_clip(video, masks, args), filled, strict=True):
        yield paste(frame, upscale(new[None], video.height, video.width), hole, args.soft_edge)[0]


def check_output(args):
    """The folder to write to, in which nothing of the user's may be replaced."""
    folder = Path(args.output_dir)
    check_writable(folder, "--output_dir")
    written = {(folder / name).resolve() for name in RESULTS}
    if written & {Path(args.video).resolve(), Path(args.mask).resolve()}:
        raise InputError(f"--output_dir={args.output_dir}: the result would replace the clip; choose another folder")
    refuse_foreign(folder, RESULTS, args.overwrite)
    return folder


def frame_file(folder, i):
    return Path(folder, "frames", f"{i:05d}.png")


def write_result(folder, video, frames, fps):
    """frames/ and result.mp4, one frame after the other, instead of those of an earlier result."""
    earlier = note_own(folder, {"frames": len(video), "result.mp4": 1})
    for i in range(len(video), earlier.get("frames", 0)):
        frame_file(folder, i).unlink(missing_ok=True)
    Path(folder, "frames").mkdir(exist_ok=True)
    source = None if video.fps is None else video
    with VideoWriter(folder / "result.mp4", video.height, video.width, fps, source) as movie:
        for i, frame in enumerate(frames):
            write_image(frame_file(folder, i), frame)
            movie.write(frame)


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    at_least(0, args, "mask_dilation", "soft_edge")
    at_least(SMALLEST_SIDE, args, "resolution")
    require(args.fps is None or 0 < args.fps < np.inf, f"--fps={args.fps}: a positive number was needed")
    check_inference_flags(args)
    video, masks = open_clip(args)
    folder = check_output(args)
    pipeline, prompt_embeds, stage = load_pipeline(args, args.weights)
    print(f"{len(video)} frames of {video.width}x{video.height}, {masks.describe()}, stage {stage}, "
          f"{len(pipeline.windows(len(video)))} windows of {min(pipeline.nframes, len(video))} frames on "
          f"{pipeline.device.type}")  # fmt: skip
    filled = fill(pipeline, prompt_embeds, *read_small(video, masks, args), args)
    write_result(folder, video, paste_all(video, masks, filled, args), args.fps)
    print(f"{folder / 'result.mp4'} and {folder / 'frames'}")


if __name__ == "__main__":
    main()
