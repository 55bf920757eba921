"""Score a converted folder on videos whose content is known, beside another folder and the plain ways to fill a hole.

python eval_DiffuEraser.py --frames dataset/DAVIS/JPEGImages/480p --videos dataset/DAVIS/ImageSets/2017/val.txt

PSNR, SSIM and flow-warping error (E_warp, in thousandths) over the frame and in the hole, of the result with the known
pixels pasted back, for every frame that has a hole. With --i3d_weights also VFID, one number for all videos. Without
--masks each video gets a synthetic hole that follows from the seed. ProPainter's published evaluation takes --size
432x240 and masks of its own.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.command_line import Parser, Renamed, require
from common.errors import InputError, one_line_errors
from common.files import check_writable, note_own, refuse_foreign
from common.run_files import append_row, write_rows
from dataset.folders import list_folders, read_names
from dataset.images import (
    KINDS,
    describe_content,
    find_hole,
    list_frames,
    pair_by_name,
    read_frames,
    read_mask_values,
)
from dataset.utils import FULL_SPAN, MASK_SPAN_HELP, draw_holes, mask_span, split_mask_span
from libs.evaluation.baselines import BASELINES
from libs.evaluation.contact_sheet import contact_sheet, stack_sheets
from libs.evaluation.metrics import SMALLEST_FLOW, Reference, average, table
from libs.evaluation.vfid import frechet_distance, load_i3d
from libs.inference.composition import paste, resize_picture
from libs.inference.load import add_inference_flags, check_inference_flags, load_pipeline
from libs.inference.prior import ON_THE_SPOT, check_prior, make_prior, open_prior
from libs.inference.video import describe_holes, resize, stack, write_image

TRUTH = "the video itself"


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("videos and scores").add_argument
    add("--frames", required=True, metavar="DIR", help="folder with a folder of frames per video")
    add("--masks", metavar="DIR", help="folder with a folder of masks per video, of the frames' names, above 0 = hole")
    add("--videos", nargs="+", metavar="NAME", help="names of videos, or a text file of names (default: all)")
    add("--size", type=size, metavar="WxH", help="scale frames and masks to this size, such as 432x240")
    add("--compare_with", "--baseline", action=Renamed, metavar="DIR", help="another converted folder")
    add("--baselines", "--rivals", action=Renamed, nargs="*", choices=BASELINES, default=list(BASELINES),
        metavar="NAME", help=f"plain methods to compare with (default: {' '.join(BASELINES)})")  # fmt: skip
    add("--i3d_weights", metavar="FILE", help="compute VFID too: i3d_rgb_imagenet.pt, the state dict of pytorch-i3d")
    add("--no_model", action="store_true", help="score the plain methods only: no weights are needed")
    add("--output_dir", default="evaluation", metavar="DIR", help="CSV files and contact sheets (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace scores and sheets that no earlier evaluation made")
    add("--mask_span", type=mask_span, default=FULL_SPAN, metavar="MIN,MAX", help=MASK_SPAN_HELP)
    add_inference_flags(parser)
    return parser


def size(text):
    """'432x240' as (width, height)."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"WIDTHxHEIGHT such as 432x240 was needed, not {text!r}") from None
    if min(width, height) < SMALLEST_FLOW:
        raise argparse.ArgumentTypeError(f"{SMALLEST_FLOW}x{SMALLEST_FLOW} or more was needed, not {text!r}")
    return width, height


def find_videos(args):
    """The folders of frames to score, in the order of their names."""
    root = Path(args.frames)
    if not root.is_dir():
        raise InputError(f"{root} is no folder: --frames needs a folder with a folder of frames per video")
    if not args.videos:
        folders = list_folders(root)
    else:
        names = [name for entry in args.videos for name in named_videos(entry, root)]
        folders = [root / name for name in dict.fromkeys(names)]
    require(folders, f"{root} holds no folders but {describe_content(root)}: --frames needs a folder per video")
    for folder in folders:
        require(folder.is_dir(), f"{folder} is no folder: check --frames and --videos")
        require(list_frames(folder), f"{folder} holds {describe_content(folder)}: {KINDS} were needed; check --frames")
    return folders


def named_videos(entry, root):
    """The names in a text file; or the entry itself."""
    return read_names(entry, root) if entry.endswith(".txt") and Path(entry).is_file() else [entry]


def open_i3d(args, folders):
    """The network of VFID; None where it was not asked for."""
    if args.i3d_weights and len(folders) < 2:
        raise InputError("--i3d_weights: VFID needs two videos or more, one was found: check --videos or leave it out")
    return load_i3d(args.i3d_weights) if args.i3d_weights else None


def load_video(folder, number, args):
    """(frames (f, h, w, 3), holes (f, h, w), what is worth saying about its masks) of a whole video."""
    note = ""
    if args.masks:
        masks = Path(args.masks, folder.name)
        pairs = pair_by_name(folder, masks, ("--frames", "--masks"))
        frames = np.stack(read_frames([frame for frame, _ in pairs]))
        found = [(mask.name, *find_hole(*read_mask_values(mask))) for _, mask in pairs]
        holes = stack([(name, hole) for name, hole, _ in found], masks)
        note = next((f"{name} has {note}" for name, _, note in found if note), "")
        if holes.shape != frames.shape[:3]:
            raise InputError(f"{masks} and {folder} hold pictures of different sizes: masks of the frames' were needed")
        if not holes.any():
            raise InputError(f"{masks} marks nothing: any value above 0 is hole; leave --masks out for synthetic holes")
    else:
        frames = np.stack(read_frames(list_frames(folder)))
        holes = draw_holes(*frames.shape[:3], args, number)
    width, height = args.size or (frames.shape[2], frames.shape[1])
    if min(width, height) < SMALLEST_FLOW:
        raise InputError(
            f"{folder} is {width}x{height}: {SMALLEST_FLOW}x{SMALLEST_FLOW} or more was needed; use --size"
        )
    return *resize(frames, holes, height, width), note


def make_methods(args):
    """{name: function of (frames, holes, prior or None) that returns filled frames}; the models come last."""
    methods = {TRUTH: lambda frames, holes, prior: frames}
    methods |= {name: lambda frames, holes, prior, fill=BASELINES[name]: fill(frames, holes) for name in args.baselines}
    if args.prior not in ON_THE_SPOT:
        methods[f"prior {args.prior}"] = lambda frames, holes, prior: prior
    if not args.no_model:
        if args.compare_with:
            methods[f"baseline {args.compare_with}"] = fill_with(args, args.compare_with)
        methods[args.weights] = fill_with(args, args.weights)
    return methods


def fill_with(args, weights):
    pipeline, prompt_embeds, _ = load_pipeline(args, weights)

    def fill(frames, holes, prior):
        prior = make_prior(args.prior, frames, holes) if prior is None else prior
        work = pipeline.count_work(len(frames), prior is not None)
        with tqdm(total=work, leave=False, unit="frame", disable=None) as bar:
            return pipeline.fill(frames, holes, prompt_embeds, args.seed, prior, progress=bar.update)

    return fill


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    split_mask_span(args)
    check_inference_flags(args)
    if args.no_model and not args.baselines:
        raise InputError("--no_model and an empty --baselines leave nothing to score: leave one of them out")
    folders = find_videos(args)
    if args.masks:  # all of them, before hours are spent on the first
        for folder in folders:
            pair_by_name(folder, Path(args.masks, folder.name), ("--frames", "--masks"))
    for folder in folders:
        check_prior(args.prior, folder, list_frames(folder))
    output_dir = Path(args.output_dir)
    check_writable(output_dir, "--output_dir")
    written = ["scores.csv", "means.csv", *(f"{folder.name}.png" for folder in folders)]
    refuse_foreign(output_dir, written, args.overwrite)
    i3d = open_i3d(args, folders)
    methods, scores = make_methods(args), {}
    note_own(output_dir, dict.fromkeys(written, 1))
    by_video = output_dir / "scores.csv"
    by_video.unlink(missing_ok=True)
    features = {name: [] for name in methods}  # (1024,) of every video
    for number, folder in enumerate(folders):
        frames, holes, note = load_video(folder, number, args)
        prior = open_prior(args.prior, folder, list_frames(folder))
        if prior is not None:
            prior = np.stack([resize_picture(frame, *holes.shape[1:]) for frame in prior])
        reference, sheets = Reference(frames, holes), []
        for name, method in methods.items():
            result = paste(frames, method(frames, holes, prior), holes)
            values = {"frames": reference.scored_frames, **reference.score(result)}
            scores.setdefault(name, []).append(values)
            append_row(by_video, {"method": name, "video": folder.name, **values})
            if i3d:
                features[name].append(i3d.describe(result, folder.name))
            sheets.append(contact_sheet(f"{folder.name}: {name}", frames, holes, result))
        write_image(output_dir / f"{folder.name}.png", stack_sheets(sheets[1:]))
        shares = [float(np.count_nonzero(hole) / hole.size) for hole in holes]
        print(f"{folder.name}: {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}, "
              f"{describe_holes(shares, note)}", flush=True)  # fmt: skip
    means = {name: average(entries) for name, entries in scores.items()}
    if i3d:
        for name in methods:
            means[name]["vfid"] = frechet_distance(features[TRUTH], features[name])
    if args.compare_with and not args.no_model:
        *_, before, after = means.values()
        means["difference"] = {**{name: after[name] - before[name] for name in after}, "frames": after["frames"]}
    write_rows(output_dir / "means.csv", [{"method": name, "videos": len(folders), **means[name]} for name in means])
    print("\n".join(table(means)))
    if i3d:
        print(f"VFID is of {len(folders)} videos: compare it with that of as many only")
    print(f"per video: {by_video}; this table: means.csv; contact sheets: {output_dir}")


if __name__ == "__main__":
    main()
