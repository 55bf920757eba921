"""Which checkpoint of a run is the best on its validation videos, and which others differ from it by more than chance.

python -m libs.checkpoints.rank finetune-stage1 --by psnr_hole

Reads what the run's validations have written for every video: checkpoints count at whose steps videos were scored.
Intervals are over videos: a few of them show large differences only.
"""

import math
from pathlib import Path

import numpy as np

from common.command_line import Parser, require
from common.errors import InputError, one_line_errors
from common.run_files import HELD_OUT_FILE, SCORES_FILE, of_form, read_rows, read_starts, validation_form
from libs.checkpoints.checkpoint import HELD_OUT, list_checkpoints
from libs.evaluation.intervals import compare
from libs.evaluation.metrics import SCORES, Score, measure_words

MEASURES = {HELD_OUT: Score("held-out loss", "", 4, False), **SCORES}


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="a training run's output folder")
    parser.add_argument("--by", choices=MEASURES, help="a score, or the held-out loss (default: the run's --best_by)")
    return parser


def read_values(run_dir, by):
    """({step: {(number, name, setup) of a video: value}} of a run's validations, the form that they have)."""
    settings = read_starts(run_dir)[-1]["settings"]
    folder, form = run_dir / settings["logging_dir"], validation_form(settings, deployed_first=True)
    values, after = {}, -1
    if by == HELD_OUT and any(folder.glob(f"{Path(HELD_OUT_FILE).stem}-until-*")):
        # The run went on with other clips there: the losses up to that step do not compare.
        after = next((int(row["step"]) for row in read_rows(folder / HELD_OUT_FILE)), after)
    for row in read_rows(folder / of_form(SCORES_FILE, form)):
        if int(row["step"]) > after and row.get(by) and math.isfinite(float(row[by])):
            setup = "" if by == HELD_OUT else row.get("setup")  # scores of other holes do not compare
            values.setdefault(int(row["step"]), {})[row["number"], row["video"], setup] = float(row[by])
    return values, "" if by == HELD_OUT else form


def rank(run_dir, by):
    """Lines of a table, the best checkpoint first. Raises InputError where there is nothing to rank."""
    try:
        values, form = read_values(run_dir, by)
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{run_dir} holds scores or losses that are not as the run wrote them ({error!r}): put them "
                         "back as they were, or choose another --by") from None  # fmt: skip
    checkpoints = [(step, folder.name) for step, folder in list_checkpoints(run_dir)]
    require(checkpoints, f"{run_dir} holds no checkpoints: a training run's output folder was needed")
    heading, unit, decimals, higher = MEASURES[by]
    scored = [(step, name) for step, name in checkpoints if step in values]
    require(scored, f"{run_dir} has no {heading} of a checkpoint's step for any video: choose another --by, or train "
            "with validation at the checkpoints' steps")  # fmt: skip
    videos = sorted(values[scored[-1][0]])  # earlier steps may have been on others, or with other holes
    table = {name: np.array([values[step][video] for video in videos])
             for step, name in scored if values[step].keys() >= set(videos)}  # fmt: skip
    order = sorted(table, key=lambda name: table[name].mean(), reverse=higher)
    title = f"{measure_words(by)}{form.replace('-', ' ')}, mean of {len(videos)} video(s)"
    lines, width = [f"by {title}; differences from the best"], max(map(len, table))
    for name in order:
        words = "the best"
        if name != order[0]:
            words = compare((table[name] - table[order[0]])[:, None], higher, unit, decimals).verdict
        lines.append(f"{name:<{width}}  {table[name].mean():.{decimals}f}{unit}  {words}")
    left = [name for _, name in checkpoints if name not in table]
    if left:
        lines.append(f"not scored on all of these videos with these holes and settings: {', '.join(left)}")
    return lines


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    starts = read_starts(args.run_dir)
    require(starts, f"{args.run_dir} has no config.json of a training run: a run's output folder was needed")
    print("\n".join(rank(args.run_dir, args.by or starts[-1]["settings"].get("best_by", HELD_OUT))))


if __name__ == "__main__":
    main()
