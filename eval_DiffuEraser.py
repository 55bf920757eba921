"""Score converted folders on videos, beside each other and beside the plain ways to fill a hole.

python eval_DiffuEraser.py --frames dataset/DAVIS/JPEGImages/480p --videos dataset/DAVIS/ImageSets/2017/val.txt

PSNR, SSIM and flow-warping error (E_warp, in thousandths) over the frame and in the hole, of the result with the known
pixels pasted back, for every frame that has a hole; of the background before that. Networks whose weights are given add
their scores. Without --masks each video gets a synthetic hole that follows from the seed. --protocol fixes all that
changes a number as published evaluations have it. The same command goes on where it was stopped.
"""

import argparse

import common.libraries  # noqa: F401
from common.command_line import Parser, Renamed, at_least, require
from common.errors import one_line_errors
from common.files import locked
from dataset.images import list_frames
from dataset.utils import FULL_SPAN, MASK_SPAN_HELP, mask_span, split_mask_span
from libs.comparison.page import write_page
from libs.comparison.plan import Plan
from libs.comparison.protocols import PROTOCOLS, follows_seed
from libs.comparison.results import Results
from libs.comparison.scoring import Tools, score
from libs.evaluation.baselines import BASELINES
from libs.evaluation.metrics import SMALLEST_FLOW
from libs.evaluation.networks import add_network_flags, missing_networks
from libs.inference.load import add_inference_flags, check_inference_flags
from libs.inference.prior import ON_THE_SPOT, check_prior

MOST_SEEDS = 1000  # beyond, videos would share their noise; see noise_seed


def build_parser():
    parser = Parser(__doc__)
    add = parser.add_argument_group("videos and scores").add_argument
    add("--frames", required=True, metavar="DIR",
        help="folder with a folder of frames per video, or one of with/, without/ and masks/")  # fmt: skip
    add("--masks", metavar="DIR", help="folder with a folder of masks per video, of the frames' names, above 0 = hole")
    add("--videos", nargs="+", metavar="NAME", help="names of videos, or a text file of names (default: all)")
    add("--protocol", choices=PROTOCOLS,
        help="a published evaluation, or a task, with all that changes a number; see docs/inference.md")  # fmt: skip
    add("--size", type=size, metavar="WxH", help="scale frames and masks to this size, such as 432x240")
    add("--compare_with", "--baseline", action=Renamed, nargs="+", default=[], metavar="DIR",
        help="other converted folders; the first is what the others are compared with")  # fmt: skip
    add("--baselines", "--rivals", action=Renamed, nargs="*", choices=BASELINES, default=list(BASELINES),
        metavar="NAME", help=f"plain methods to compare with (default: {' '.join(BASELINES)})")  # fmt: skip
    add("--seeds", type=int, default=1, metavar="N",
        help="score with --seed and the numbers after it, N in all (default: 1)")  # fmt: skip
    add("--i3d_weights", metavar="FILE", help="compute VFID too: i3d_rgb_imagenet.pt, the state dict of pytorch-i3d")
    add_network_flags(add)
    add("--no_model", action="store_true", help="score the plain methods only: no weights are needed")
    add("--num_processes", type=int, default=1, metavar="N",
        help="share the videos among N processes, each on a GPU of its own (default: 1)")  # fmt: skip
    add("--output_dir", default="evaluation", metavar="DIR",
        help="tables, report.html with its clips, contact sheets (default: %(default)s)")  # fmt: skip
    add("--overwrite", action="store_true",
        help="score anew, and replace what other settings, or no earlier evaluation, made")  # fmt: skip
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


def check(args):
    """The Plan of flags that go together. Raises InputError for others."""
    split_mask_span(args)
    check_inference_flags(args)
    at_least(1, args, "seeds", "num_processes")
    require(args.seeds <= MOST_SEEDS, f"--seeds={args.seeds}: at most {MOST_SEEDS} were needed")
    require(args.baselines or not args.no_model or args.prior not in ON_THE_SPOT,
            "--no_model and an empty --baselines leave nothing to score: leave one of them out")  # fmt: skip
    require(
        not args.no_model or not args.compare_with,
        f"--compare_with={' '.join(args.compare_with)}: --no_model scores no folders; leave one of them out",
    )
    plan = Plan.of(args)
    require(plan.protocol.takes_priors or args.prior in ON_THE_SPOT,
            f"--prior={args.prior}: --protocol={args.protocol} takes one of {', '.join(ON_THE_SPOT)}")  # fmt: skip
    require(args.prior in ON_THE_SPOT or args.seeds == 1 or not follows_seed(plan.protocol, args),
            f"--prior={args.prior} --seeds={args.seeds}: every seed draws other holes, and a folder of frames has "
            "one of them filled: give --masks, or one seed")  # fmt: skip
    if plan.protocol.takes_priors:
        for folder in plan.folders:
            check_prior(args.prior, folder, list_frames(folder), plan.size)
    require(not args.i3d_weights or plan.protocol.has_truth, f"--i3d_weights: VFID needs true videos, which "
            f"--protocol={args.protocol} does not have; leave it out")  # fmt: skip
    require(not args.i3d_weights or len(plan.folders) > 1,
            "--i3d_weights: VFID needs two videos or more, one was found: check --videos or leave it out")  # fmt: skip
    return plan


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    plan = check(args)
    for line in (plan.describe_other_set(), missing_networks(args)):
        if line:
            print(line)
    plan.check_output_dir()
    tools = Tools.load(plan) if args.num_processes == 1 and plan.jobs_left() else None
    with locked(plan.output_dir):
        plan.check_output_dir()  # another run may have ended meanwhile
        plan.begin()
        score(plan, tools)
        results = Results(plan)
        print("\n".join(results.write()))
        page = write_page(plan.output_dir, args.overwrite)
    print(f"per video: {plan.output_dir / 'scores.csv'}; this table: means.csv; to look at: {page}")
    results.refuse_gaps()


if __name__ == "__main__":
    main()
