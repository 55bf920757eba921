"""One self-contained HTML page of an evaluation: scores with intervals, and every video to play and compare.

python -m libs.comparison.page evaluation
"""

import base64
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

from common.command_line import Parser, require
from common.errors import InputError, one_line_errors
from common.files import refuse_foreign
from common.pages import make_page
from common.run_files import read_table
from libs.comparison.clips import CLIPS

PAGE = "report.html"
INLINE_BYTES = 19_500_000  # of clips in base64, the rest of a page adds about 0.3 MB; further clips are links
CHOSEN_FIRST = ("lpips_hole", "rc_s", "psnr_hole")  # follow people best, where there are networks for them
SIGNS = {"better": "▲", "worse": "▼", "none": "○"}


def write_page(output_dir, overwrite=False):
    """Write report.html into an evaluation's folder, from the files there alone; returns its path.

    Raises: InputError for a folder that is no evaluation's, and for a report.html that is the user's own, unless told
    to `overwrite` it.
    """
    folder = Path(output_dir)
    refuse_foreign(folder, [PAGE], overwrite)
    template, advice = Path(__file__).with_name("page.html"), "free some space, or see who may write there"
    make_page(template, gather, folder, folder / PAGE, "an evaluation's", advice)
    return folder / PAGE


def gather(folder):
    """{name: value} for page.html. Raises InputError for a folder that is no evaluation's."""
    if not (folder / "evaluation.json").is_file():
        raise InputError(f"{folder} has no evaluation.json: an output folder of eval_DiffuEraser.py was needed")
    made = json.loads((folder / "evaluation.json").read_bytes())
    begun = "methods" in made and "scores" not in made  # the latter are written at the end
    require(not begun, f"{folder} holds an evaluation that is not finished: run the same command of "
            "eval_DiffuEraser.py again")  # fmt: skip
    texts = json.loads(Path(__file__).with_name("page_texts.json").read_bytes())
    scores, names = made["scores"], [method["name"] for method in made["methods"]]
    per_video = mean_of_seeds(read_table(folder / "scores.csv"), scores)
    verdicts = read_verdicts(folder / "comparisons.csv", scores)
    clips = read_clips(folder, made["videos"])
    in_clips = [name for clip in clips if clip["about"] for name in clip["about"]["methods"]]
    seen = list(dict.fromkeys([*names, *in_clips]))  # the truth may be among the latter
    return {
        "made": made,
        "texts": texts,
        "signs": SIGNS,
        "protocol": {name: as_text(value) for name, value in made["protocol"].items() if name != "name"},
        "table": scores_table(read_table(folder / "means.csv"), scores, names),
        "verdicts": verdicts,
        "clips": [clip["inline"] for clip in clips],
        "beside": sum(clip["href"] is not None for clip in clips),
        "data": {
            "methods": seen,
            "reference": made["reference"],
            "right": shown_first(made),
            "scores": {name: scores[name] for name in per_video},
            "score": next((name for name in CHOSEN_FIRST if name in per_video), next(iter(per_video), None)),
            "values": {
                score: [[by_video.get((method, video)) for video in made["videos"]] for method in seen]
                for score, by_video in per_video.items()
            },
            "verdicts": {score: {row["method"]: row for row in rows} for score, rows in verdicts.items()},
            "videos": [
                {"name": video, "sheet": link(folder, f"{video}.png"), "href": clip["href"], "clip": clip["about"]}
                for video, clip in zip(made["videos"], clips, strict=True)
            ],
            "texts": texts,
        },
    }


def shown_first(made):
    """The method that a reader wants to see beside the input: the last weights that others are not compared with."""
    others = [method for method in made["methods"] if method["name"] != made["reference"]] or made["methods"]
    weights = [method["name"] for method in others if method["kind"] == "weights"]
    return weights[-1] if weights else others[0]["name"]


def mean_of_seeds(rows, scores):
    """{score: {(method, video): mean over the seeds}}, where it is finite for all, as in the verdicts; scores that have
    none are left out."""
    entries = {score: defaultdict(list) for score in scores}
    for row in rows:
        for score in scores:
            entries[score][row["method"], row["video"]].append(as_number(row.get(score)))
    means = {
        score: {key: fmean(values) for key, values in found.items() if all(map(math.isfinite, values))}
        for score, found in entries.items()
    }
    return {score: found for score, found in means.items() if found}


def as_number(text):
    return float(text) if text else math.nan


def read_verdicts(path, scores):
    """{score: [comparison of a method with the reference, numbers as they are shown]}."""
    verdicts = defaultdict(list)
    for row in read_table(path):
        about = scores[row["score"]]
        mean, low, high = (as_shown(as_number(row[name]), about, "+") for name in ("mean", "low", "high"))
        verdicts[row["score"]].append({
            "method": row["method"], "mean": mean, "unit": about["unit"], "interval": f"[{low}, {high}]",
            "wins": int(row["wins"]), "videos": int(row["videos"]), "seeds": int(row["seeds"]),
            "found": next((word for word in ("better", "worse") if row["verdict"].startswith(f"{word}:")), "none"),
        })  # fmt: skip
    return dict(verdicts)


def scores_table(rows, scores, names):
    """{score: {method: (mean as text, whether no other is better)}} of means.csv, sets' scores among them."""
    means = {row["method"]: row for row in rows if row["method"] in names}
    table = {}
    for score, about in scores.items():
        values = {method: as_number(row.get(score)) for method, row in means.items()}
        numbers = [value for value in values.values() if not math.isnan(value)]
        if numbers:
            best = max(numbers) if about["higher_is_better"] else min(numbers)
            differ = len(set(numbers)) > 1
            table[score] = {
                method: (as_shown(value, about), differ and value == best) for method, value in values.items()
            }
    return table


def as_shown(value, about, sign=""):
    return "–" if math.isnan(value) else f"{value:{sign}.{about['decimals']}f}".replace("inf", "∞")


def read_clips(folder, videos):
    """[{about: what its JSON says or None, inline: base64 or None, href: a link or None}] of every video's clip.

    The first ones are inside the page, as far as INLINE_BYTES reach, the others beside it.
    """
    clips, left = [], INLINE_BYTES
    for video in videos:
        path, about = folder / CLIPS / f"{video}.mp4", folder / CLIPS / f"{video}.json"
        clip = {"about": None, "inline": None, "href": None}
        if path.is_file() and about.is_file():  # the latter comes last, so that both are whole
            clip["about"] = json.loads(about.read_bytes())
            left -= 4 * math.ceil(path.stat().st_size / 3) + about.stat().st_size
            if left >= 0:
                clip["inline"] = base64.b64encode(path.read_bytes()).decode()
            else:
                clip["href"] = link(folder, f"{CLIPS}/{video}.mp4")
        clips.append(clip)
    return clips


def link(folder, name):
    """A file's address relative to the page; None where it is not there."""
    return quote(name, errors="surrogateescape") if (folder / name).is_file() else None


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("output_dir", help="an evaluation's output folder, such as evaluation")
    parser.add_argument("--overwrite", action="store_true", help="replace a report.html that no earlier report made")
    print(write_page(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
