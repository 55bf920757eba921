"""One dataset of several, by links: the drawn videos, and real ones beside them.

python -m toy.join_videos --output_dir joined --davis_roots dataset/DAVIS toy/data/DAVIS --ytvos_roots toy/data/YTBV
"""

from pathlib import Path

from common.command_line import Parser, require
from common.errors import one_line_errors

KINDS = ("JPEGImages", "Annotations")
LISTS = ("train.txt", "val.txt")


def join_videos(output_dir, davis_roots, ytvos_roots):
    """Write `output_dir`/DAVIS and /YTBV with links to the folders of all; names in the lists come in the roots' order.

    Raises: InputError where two roots have a video of one name.
    """
    davis = Path(output_dir, "DAVIS")
    link_folders(davis, davis_roots, "480p")
    link_folders(Path(output_dir, "YTBV"), ytvos_roots, "")
    lists = davis / "ImageSets/2017"
    lists.mkdir(parents=True, exist_ok=True)
    for name in LISTS:
        (lists / name).write_text("\n".join(Path(root, "ImageSets/2017", name).read_text() for root in davis_roots))


def link_folders(output_dir, roots, size):
    for kind in KINDS:
        folder = output_dir / kind / size
        folder.mkdir(parents=True, exist_ok=True)
        for root in roots:
            for video in sorted(Path(root, kind, size).glob("*/")):
                link, target = folder / video.name, video.resolve()
                if not link.is_symlink():
                    link.symlink_to(target)
                require(link.resolve() == target, f"{link} is {link.resolve()}, not {target}: another --output_dir or "
                        "other names were needed")  # fmt: skip


@one_line_errors
def main():
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--davis_roots", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--ytvos_roots", nargs="+", required=True, metavar="DIR")
    options = parser.parse_args()
    join_videos(options.output_dir, options.davis_roots, options.ytvos_roots)


if __name__ == "__main__":
    main()
