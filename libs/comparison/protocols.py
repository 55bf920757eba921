"""Protocols: all that changes a number besides the method, under a name. Without one the user's flags decide.

A protocol says what is shown and hidden, refuses flags that contradict it, and describes itself in the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.command_line import require
from dataset.utils import FULL_SPAN
from libs.comparison import videos

AREA = "frames by area, masks by nearest"
WITH_HOLE = "those that have a hole"
RESTORATION = ("psnr_hole", "lpips_hole", "warp_hole")


@dataclass(frozen=True)
class Protocol:
    rules: dict  # what changes a number, in words
    read: Callable = videos.read_restoration
    find: Callable = videos.find_videos
    check: Callable = videos.check_restoration
    size: tuple | None = None  # (width, height) of all frames; None: see may_scale
    may_scale: bool = True  # --size is the user's choice, and the frames' own without it
    masks: str = "needed"  # or "optional", "refused"
    drawn: bool = False  # something besides a model's noise follows from the seed, in every case
    has_truth: bool = True
    pasted: bool = True  # the known pixels are pasted back before anything is scored
    takes_priors: bool = True  # of another method's frames
    published: int | None = None  # videos of the set that published numbers are of
    verdicts: tuple = RESTORATION  # scores that are compared in words


DEFAULT = Protocol({"scaling": AREA, "frames": WITH_HOLE}, masks="optional")
PROPAINTER = {
    "masks": "ProPainter's test masks: the mask of a frame's place, nearest by Pillow, above 0, dilated 4 times by a "
    "cross of 3x3 pixels",
    "scaling": "frames bilinear, without averaging",
    "order": "videos and frames by their names, all frames of a video",
    "frames": "all of them: every test mask has a hole",
    "rounding": "results are whole numbers from 0 to 255; ProPainter's own script cuts fractions off, and scores the "
    "unrounded mean where its windows overlap",
    "means": "over the frames of all videos",
}
propainter = partial(
    Protocol, PROPAINTER, videos.read_propainter, videos.find_propainter, videos.check_propainter, size=(432, 240),
    may_scale=False,
)  # fmt: skip
OBJECT = {
    "frames": WITH_HOLE,
    "scaling": AREA,
    "known pixels": "as the method gives them, as shadows lie outside masks",
}
PROTOCOLS = {
    "propainter-davis": propainter(published=50),
    "propainter-ytvos": propainter(published=508),
    "davis-removal": Protocol(
        {"masks": "annotations, all objects, dilated 4 times by a cross of 3x3 pixels", "scaling": "none",
         "frames": WITH_HOLE, "known pixels": "background scores: before they are pasted back; others after"},
        videos.read_removal, may_scale=False, has_truth=False, verdicts=("rc_s", "rc_t", "tc", "psnr_background"),
    ),
    "pairs": Protocol(
        {"masks": "of the pairs, above 0, not dilated", **OBJECT},
        videos.read_pair, check=videos.check_pairs, masks="refused", pasted=False, takes_priors=False,
        verdicts=("psnr", *RESTORATION),
    ),
    "pasted-objects": Protocol(
        {"masks": "of an object of another video, which is pasted in; by seed and place in the list", **OBJECT},
        videos.read_pasted, check=videos.check_pasted, drawn=True, pasted=False, takes_priors=False,
        verdicts=("psnr", *RESTORATION),
    ),
}  # fmt: skip


def choose_protocol(args):
    """The protocol of --protocol; args.size becomes its size. Raises InputError for flags that contradict it."""
    name, protocol = args.protocol, PROTOCOLS.get(args.protocol, DEFAULT)
    wanted, given = size_text(protocol.size), size_text(args.size)
    require(protocol.may_scale or given in (None, wanted),
            f"--size={given}: --protocol={name} takes {wanted or 'frames as they are'}; leave it out")  # fmt: skip
    require(args.masks or protocol.masks != "needed",
            f"--protocol={name} needs --masks, a folder with a folder of masks per video")  # fmt: skip
    require(not args.masks or protocol.masks != "refused",
            f"--masks: --protocol={name} takes the masks that lie in --frames; leave it out")  # fmt: skip
    require(not args.masks or Path(args.masks).is_dir(),
            f"{args.masks} is no folder: --masks needs a folder with a folder of masks per video")  # fmt: skip
    usual_span = args.mask_span == FULL_SPAN and not args.mask_original_margins
    source = f"--masks={args.masks}" if protocol is DEFAULT else f"--protocol={name}"
    require(usual_span or (protocol is DEFAULT and not args.masks),
            f"--mask_span is about synthetic holes, which {source} does not have; leave one of them out")  # fmt: skip
    args.size = protocol.size or args.size
    return protocol


def size_text(size):
    """(432, 240) as "432x240"; None stays None."""
    return size and "{}x{}".format(*size)


def follows_seed(protocol, args):
    """Whether more than a model's noise follows from the seed: then plain methods have a score for every seed."""
    return protocol.drawn or (protocol is DEFAULT and not args.masks)


def describe(protocol, args):
    """{what changes a number: what it is}, of the protocol and of what it leaves to the flags."""
    if protocol is DEFAULT:
        span = "original" if args.mask_original_margins else ",".join(f"{share:.3g}" for share in args.mask_span)
        drawn = f"drawn, by seed and place in the list, mask_span {span}"
        chosen = {"masks": "of --masks, any value above 0" if args.masks else drawn}
    else:
        chosen = {}
    return {
        "name": args.protocol or "none",
        "size": size_text(args.size) or "the frames' own",
        **chosen,
        "known pixels": "pasted back" if protocol.pasted else "as the method gives them",
        "noise": "of its own for every video: seed + 1000 times its place in the list",
        "truth": "known" if protocol.has_truth else "not known",
        **protocol.rules,
    }
