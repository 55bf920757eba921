"""What the report page shows of a run, read from its folder."""

import base64
import io
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from common.errors import InputError
from common.files import list_numbered
from common.run_files import (
    CONTACT_SHEET,
    HELD_OUT_FILE,
    HISTORY_FILE,
    SCORES_FILE,
    of_form,
    read_rows,
    read_starts,
    validation_form,
)
from dataset.images import UNREADABLE
from libs.checkpoints.checkpoint import HELD_OUT, list_checkpoints, measure_of, read_best
from libs.evaluation.metrics import SCORES, average, measure_words
from libs.report.charts import Chart, Line, smooth

SAMPLES, SCORE_ROWS = 6, 12  # validations shown, spread evenly over the run
SAMPLE_SIDE = 240  # pixels of a sample's longer side


def gather(run_dir):
    """{name: value} for page.html. Raises InputError for a folder that is not a run's, or whose run has no step yet."""
    starts = read_starts(run_dir)
    if not starts:
        raise InputError(f"{run_dir} has no config.json of a training run: a run's output folder was needed")
    folder = run_dir / starts[-1]["settings"]["logging_dir"]
    history = numbers(read_rows(folder / HISTORY_FILE))
    if not history:
        raise InputError(f"{folder}/{HISTORY_FILE} has no step yet: wait for the run's first line in the log")
    held_out = numbers(read_rows(folder / HELD_OUT_FILE))
    form = validation_form(starts[-1]["settings"])
    scored, scores = average_by_step(numbers(read_rows(folder / of_form(SCORES_FILE, form))))
    best = read_best(run_dir)
    videos = [Path(video).name for video in starts[-1]["settings"]["validation_image"]]
    return {
        "title": f"{run_dir.resolve().name}: step {history[-1]['step']:.0f}",
        "facts": facts(history, held_out, best),
        "curves": curves(history, held_out, scores),
        "resources": [
            Chart("seconds per step", Line(column(history, "seconds_per_step"))),
            Chart("peak memory, GiB", Line(column(history, "peak_gib"))),
        ],
        "scored_by": {name: score for name, score in SCORES.items() if any(name in row for row in scores.values())},
        "scored": scored,
        "scores": evenly(list(scores.items()), SCORE_ROWS),
        "samples": samples(folder / "samples", videos, form),
        "checkpoints": checkpoints(run_dir, held_out, best),
        "sheet": newest_sheet(folder / "samples", form),
        "starts": starts,
    }


def numbers(rows):
    """CSV rows with numbers where there are some."""
    return [{key: as_number(value) for key, value in row.items()} for row in rows]


def as_number(text):
    try:
        return float(text)
    except ValueError:
        return text


def average_by_step(rows):
    """(number of videos, {step: mean scores over them}), in the order of steps: those that the last step has, and the
    steps that have them all. A validation leaves out what it has no time for, and means over others, or of other holes,
    do not compare."""
    by_step = defaultdict(dict)
    for row in rows:
        by_step[int(row["step"])][row["number"], row["video"], row.get("setup")] = row
    videos = list(by_step[max(by_step)]) if by_step else []
    steps = {step: found for step, found in sorted(by_step.items()) if found.keys() >= set(videos)}
    return len(videos), {step: average([found[video] for video in videos]) for step, found in steps.items()}


def column(rows, name):
    return [(row["step"], row[name]) for row in rows]


def evenly(items, most):
    """At most `most` of the items, spread evenly, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(items) - 1, most).round().astype(int)) if items else []
    return [items[i] for i in chosen]


def facts(history, held_out, best):
    """[(name, value)] as text."""
    last = history[-1]
    entries = [
        ("step", f"{last['step']:.0f}"),
        ("training loss, mean", f"{smooth(column(history, 'loss'))[-1][1]:.4f}"),
    ]
    if held_out:
        start, now = held_out[0]["held_out_loss"], held_out[-1]["held_out_loss"]
        entries.append(("held-out loss", f"{now:.4f} ({now / start:.3f} of its start)"))
    if best:
        measure, value = measure_of(best)
        entries.append((f"best by {measure_words(measure)}", f"{best['checkpoint']} ({value:.4f})"))
    return [*entries, ("s/step", f"{last['seconds_per_step']:.2f}"), ("peak memory", f"{last['peak_gib']:.1f} GiB")]


def curves(history, held_out, scores):
    """The charts that tell whether training works."""
    loss = column(history, "loss")
    in_hole = [row for row in held_out if isinstance(row.get("held_out_loss_hole"), float)]  # none in older runs

    def score(name, meaning):
        line = Line([(step, means[name]) for step, means in scores.items()], "green")
        return Chart(f"{SCORES[name].heading}: {meaning}", line, from_zero=False)

    return [
        Chart(
            "held-out loss: comparable from step to step",
            Line(column(held_out, "held_out_loss"), "red", "of frames"),
            Line(column(in_hole, "held_out_loss_hole"), "blue", "in the hole"),
        ),
        Chart("training loss: at random timesteps", Line(loss, "pale", "logged"), Line(smooth(loss), "blue", "mean")),
        score("psnr_hole", "dB, higher is better"),
        score("ssim_hole", "higher is better"),
        score("warp_hole", "flicker, lower is better"),
        Chart("learning rate", Line(column(history, "lr"))),
    ]


def samples(folder, videos, form):
    """(steps, [(video, [animation, or None, at each step])])."""
    validations = evenly(list_numbered(folder, "sample"), SAMPLES)
    rows = [
        (video, [animation(path / f"{n}{form}.gif") for _, path in validations])
        for n, video in enumerate(videos, start=1)
    ]
    return [step for step, _ in validations], rows


def animation(path):
    """A GIF as a small WebP's data URL: a page of many stays a few megabytes. None where it cannot be read."""
    try:
        with Image.open(path) as gif:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]
            duration = gif.info.get("duration", 125)
    except UNREADABLE:
        return None
    for frame in frames:
        frame.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
    content = io.BytesIO()
    frames[0].save(content, "webp", save_all=True, append_images=frames[1:], duration=duration, loop=0, quality=80)
    return data_url(content.getvalue(), "webp")


def newest_sheet(folder, form):
    """The newest whole contact sheet's data URL, or None."""
    for _, path in reversed(list_numbered(folder, "sample")):
        try:
            content = (path / of_form(CONTACT_SHEET, form)).read_bytes()
            Image.open(io.BytesIO(content)).load()
        except UNREADABLE:  # missing, or being written
            continue
        return data_url(content, "png")
    return None


def data_url(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def checkpoints(run_dir, held_out, best):
    """[{name, size in GB or None for one that was deleted, held-out loss or None, best}]."""
    losses = {row["step"]: row["held_out_loss"] for row in held_out}
    rows = []
    for step, folder in list_checkpoints(run_dir):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
        is_best = bool(best) and best["checkpoint"] == folder.name
        rows.append({"name": folder.name, "size": size, "loss": losses.get(step), "best": is_best})
    if best and not Path(run_dir, best["checkpoint"]).is_dir():
        rows.append({"name": best["checkpoint"], "size": None, "loss": best.get(HELD_OUT), "best": True})
    return rows
