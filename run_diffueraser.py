"""Remove an object from a clip of your own with a converted folder.

python run_diffueraser.py --video clip.mp4 --mask mask.mp4 --output_dir results/clip
python run_diffueraser.py --video clip.mp4 --mask mask.mp4 --output_dir results/clip --as_deployed --prior prior.mp4
"""

import os
import signal
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import cv2
from tqdm import tqdm

import common.libraries  # noqa: F401
from common.command_line import Parser, at_least, require
from common.errors import InputError, one_line_errors
from common.files import check_writable, is_filled, note_own, read_own, refuse_foreign
from common.threads import in_threads
from libs.inference.composition import (
    compose_as_deployed,
    grow_as_deployed,
    paste_frame,
    resize_as_deployed,
    resize_picture,
    size_as_deployed,
)
from libs.inference.load import add_inference_flags, check_inference_flags, load_pipeline, own_default
from libs.inference.prior import ON_THE_SPOT, make_prior
from libs.inference.streams import Mapped, Stream
from libs.inference.video import Masks, dilate, open_video, write_image
from libs.inference.video_file import DEFAULT_FPS, VideoWriter

RESULTS = ("frames", "result.mp4")
KEPT = "frames.before"  # where --overwrite puts frames of the user's own
SMALLEST_SIDE = 8  # pixels, one of the latents


def build_parser():
    parser = Parser(__doc__)
    add = parser.add_argument_group("clip").add_argument
    add("--video", required=True, metavar="PATH", help="a video file, a folder of frames, or an image")
    add("--mask", required=True, metavar="PATH",
        help="what to remove is white: a video file, a folder of masks, or one image for all frames")  # fmt: skip
    add("--output_dir", required=True, metavar="DIR", help="result.mp4 and frames/ are written there")
    add("--fps", type=float,
        help=f"an even rate, without sound (default: the video's own times, else {DEFAULT_FPS:g})")  # fmt: skip
    add("--overwrite", action="store_true",
        help=f"replace a frames/ (kept as {KEPT}/) or result.mp4 that no earlier result made")  # fmt: skip
    add("--resolution", type=int, metavar="PX",
        help="shrink a clip whose short side is longer while working: less memory (default: no)")  # fmt: skip
    add("--max_side", type=int, metavar="PX",
        help=f"the same for the long side ({own_default('max_side')}, and the result stays as small)")  # fmt: skip
    add("--mask_dilation", type=int, metavar="PX",
        help=f"grow the mask ({own_default('mask_dilation')}, after erosion by 1)")  # fmt: skip
    add("--soft_edge", type=int, metavar="PX",
        help="around the hole, the result fades into the clip over this width (default: 8; as deployed by a blurred "
        "mask)")  # fmt: skip
    add_inference_flags(parser)
    return parser


def open_clip(args):
    """The clip and its masks, of one size and length; both are read to their ends, and held nowhere."""
    same = os.path.realpath(args.video) == os.path.realpath(args.mask)  # Path.resolve raises at links in a circle
    require(not same, f"--mask={args.mask} is the clip itself")
    video, masks = open_video(args.video), Masks(args.mask)
    sizes = [f"{clip.width}x{clip.height}" for clip in (masks, video)]
    if sizes[0] != sizes[1]:
        remedy = "turn" if (masks.height, masks.width) == (video.width, video.height) else "scale"
        raise InputError(f"{args.mask} is {sizes[0]}, {args.video} is {sizes[1]}: masks of the clip's size were "
                         f"needed; {remedy} --mask")  # fmt: skip
    if len(masks) not in (1, len(video)):
        raise InputError(f"{args.mask} has {len(masks)} masks, {args.video} has {len(video)} frames: one for each, or "
                         "one for all, was needed")  # fmt: skip
    if max(masks.shares) == 0 or min(masks.shares) == 1:
        what = "nothing" if max(masks.shares) == 0 else "every pixel"
        raise InputError(f"{args.mask} marks {what}: white, or any value above 0 in a PNG, is what to remove")
    return video, masks


def open_prior(args, video):
    """A stream of what another method made of the clip; None where --prior is no path."""
    if args.prior in ON_THE_SPOT:
        return None
    same = os.path.realpath(args.prior) == os.path.realpath(args.video)
    require(not same, f"--prior={args.prior} is the clip itself: what another method made of it was needed")
    prior = open_video(args.prior)
    found, needed = (f"{len(clip)} frames of {clip.width}x{clip.height}" for clip in (prior, video))
    if found != needed:
        raise InputError(f"{args.prior} has {found}, {args.video} {needed}: a prior of the clip's length and size was "
                         "needed")  # fmt: skip
    return Stream(len(prior), prior.frames)


def working_size(video, args):
    """(height, width) that the model works in."""
    height, width = video.height, video.width
    if args.resolution and min(height, width) > args.resolution:
        scale = args.resolution / min(height, width)
        height, width = round(height * scale), round(width * scale)
    if args.as_deployed:
        return size_as_deployed(height, width, args.max_side)
    scale = min(1, args.max_side / max(height, width)) if args.max_side else 1
    return round(height * scale), round(width * scale)


def prepare(video, masks, args):
    """Streams (frames, holes) that the result is composed of: as deployed at the model's size, else at the clip's."""
    frames, whole = Stream(len(video), video.frames), Stream(len(video), lambda: masks.frames(len(video)))
    if not args.as_deployed:
        return frames, Mapped(lambda mask: dilate(mask[None], args.mask_dilation)[0], whole)
    height, width = working_size(video, args)
    resized = partial(resize_as_deployed, height=height, width=width)
    return Mapped(resized, frames), Mapped(lambda mask: grow_as_deployed(resized(mask), args.mask_dilation), whole)


def remove_object(pipeline, prompt_embeds, clip, prior, size, args):
    """Yield the result's frames (h, w, 3) uint8: the holes filled, and what is far from one untouched.

    Args:
        clip: streams (frames, holes) that the result is composed of.
        prior: stream of frames, or None.
        size: (height, width) that the model works in.
    """
    resized = partial(resize_as_deployed if args.as_deployed else resize_picture, height=size[0], width=size[1])
    small = [Mapped(resized, stream) for stream in clip]
    prior = make_prior(args.prior, *small) if prior is None else Mapped(resized, prior)
    work = pipeline.count_work(len(small[0]), prior is not None)
    with tqdm(total=work, desc="frames x networks", unit="frame", disable=None) as bar:
        filled = pipeline.stream(*small, prompt_embeds, args.seed, prior, progress=bar.update)

        def compose(frame, new, hole):
            if args.soft_edge is None:
                return compose_as_deployed(frame, new, hole)
            new = cv2.resize(new, hole.shape[::-1], interpolation=cv2.INTER_CUBIC)  # back from a smaller size
            return paste_frame(frame, new, hole, args.soft_edge)

        yield from in_threads(compose, clip[0], filled, clip[1])


def check_output(args):
    """The folder to write to, in which nothing of the user's may be replaced."""
    folder = Path(args.output_dir)
    check_writable(folder, "--output_dir")
    written = [(folder / name).resolve() for name in RESULTS]
    inputs = [Path(path).resolve() for path in (args.video, args.mask, args.prior)]
    if any(path.is_relative_to(target) for path in inputs for target in written):
        raise InputError(f"--output_dir={args.output_dir}: the result would replace the clip; choose another folder")
    refuse_foreign(folder, RESULTS, args.overwrite)
    frames = folder / "frames"
    require(not frames.is_file(), f"{frames} is a file, a folder was needed: move it, or choose another --output_dir")
    taken = has_foreign_frames(folder) and os.path.lexists(folder / KEPT)
    require(not taken, f"{folder} holds {KEPT} already, where its frames would go: move it, or choose another folder")
    return folder


def has_foreign_frames(folder):
    return "frames" not in read_own(folder) and is_filled(folder / "frames")


def frame_file(folder, i):
    return Path(folder, "frames", f"{i:05d}.png")


def write_result(folder, video, frames, fps):
    """frames/ and result.mp4, one frame after the other, instead of those of an earlier result. Interrupted, it leaves
    what is done.

    Args:
        video: gives the number of frames, their times and sound.
        frames: an iterator, whose frames may have another size.
    """
    first = next(frames)
    if has_foreign_frames(folder):  # --overwrite
        Path(folder, "frames").rename(folder / KEPT)
    earlier = note_own(folder, {"frames": len(video), "result.mp4": 1})
    Path(folder, "frames").mkdir(exist_ok=True)
    for i in range(earlier.get("frames", 0)):
        frame_file(folder, i).unlink(missing_ok=True)
    # Written into, it would change what a link leads to, and copies that share it, as those of `cp -al` do.
    Path(folder, "result.mp4").unlink(missing_ok=True)
    source = None if video.fps is None else video
    with VideoWriter(folder / "result.mp4", *first.shape[:2], fps, source) as movie:

        def write(i, frame):
            write_image(frame_file(folder, i), frame)
            return frame

        for frame in in_threads(write, range(len(video)), chain([first], frames)):
            movie.write(frame)


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_inference_flags(args)
    at_least(0, args, "mask_dilation", "soft_edge")
    at_least(SMALLEST_SIDE, args, "resolution", "max_side")
    possible = args.fps is None or 0.01 <= args.fps <= 1000
    require(possible, f"--fps={args.fps}: a positive number was needed, 0.01 to 1000")
    video, masks = open_clip(args)
    prior, size = open_prior(args, video), working_size(video, args)
    require(min(size) >= SMALLEST_SIDE, f"{args.video} would be worked on in {size[1]}x{size[0]} pixels, "
            f"{SMALLEST_SIDE}x{SMALLEST_SIDE} or more was needed")  # fmt: skip
    folder = check_output(args)
    pipeline, prompt_embeds, stage = load_pipeline(args, args.weights)
    windows = pipeline.windows.at_step(len(video), 0)
    print(f"{len(video)} frames of {video.width}x{video.height}, {masks.describe()}, stage {stage}, "
          f"{len(windows)} windows of {windows[0][1]} frames on {pipeline.device.type}")  # fmt: skip
    result = remove_object(pipeline, prompt_embeds, prepare(video, masks, args), prior, size, args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that what is done plays
    try:
        write_result(folder, video, result, args.fps)
    except KeyboardInterrupt:
        print(f"interrupted: {folder} holds what was done by then", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    print(f"{folder / 'result.mp4'} and {folder / 'frames'}")


if __name__ == "__main__":
    main()
