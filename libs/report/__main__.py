"""One self-contained HTML page of a run: curves, scores, samples through time, checkpoints, settings.

python -m libs.report finetune-stage1
"""

import argparse
import base64
import io
import json
import math
import struct
from collections import defaultdict
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from common.command_line import Parser
from common.errors import InputError, one_line_errors
from common.run_files import CONTACT_SHEET, HELD_OUT_FILE, HISTORY_FILE, SCORES_FILE, read_rows
from libs.checkpoints.checkpoint import list_checkpoints, read_best
from libs.evaluation.metrics import SCORES, average

WIDTH, HEIGHT = 460, 230  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 34
SAMPLES = 6  # validations shown, spread evenly over the run
SAMPLE_SIDE = 240  # of a sample's longer side
MOST_DOTS = 60  # points of a line that get a dot each
UNREADABLE = (OSError, ValueError, SyntaxError, IndexError, struct.error)  # what PIL raises for files cut short
SMOOTHING = 0.9  # of the loss's running mean
BLUE, PALE, RED, GREEN = "#1f5fa8", "#b9cfe6", "#b8372b", "#3d7f3d"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1020px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; border-bottom: 1px solid #ddd; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin-top: 1rem; }
.facts div { background: #f3f5f8; border-radius: 6px; padding: .5rem .9rem; }
.facts b { display: block; font-size: 1.15rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
figure { margin: 0; } figcaption { color: #444; font-size: .9rem; }
svg text { font: 11px system-ui, sans-serif; fill: #555; }
table { border-collapse: collapse; font-size: .9rem; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eee; }
td.n, th.n { text-align: right; }
.samples { overflow-x: auto; } .samples img { display: block; } .sheet { max-width: 100%; }
code { font-size: .85rem; overflow-wrap: anywhere; } .best { color: #b8372b; } .muted { color: #777; }
"""


def write_report(run_dir, output=None):
    """Write the page of a run's folder (report.html in it, unless `output` says where); returns its path."""
    run_dir = Path(run_dir)
    config = run_dir / "config.json"
    if not config.is_file():
        raise InputError(f"{run_dir} has no config.json: the output folder of a training run was needed")
    starts = json.loads(config.read_text())
    settings = starts[-1]["settings"]
    folder = run_dir / settings["logging_dir"]
    history = numbers(read_rows(folder / HISTORY_FILE))
    if not history:
        raise InputError(f"{folder}/{HISTORY_FILE} has no step yet: wait for the run's first line in the log")
    held_out = numbers(read_rows(folder / HELD_OUT_FILE))
    scores = average_by_step(numbers(read_rows(folder / SCORES_FILE)))
    title = f"{run_dir.resolve().name}: step {history[-1]['step']:.0f}"
    body = [
        f"<h1>{escape(title)}</h1>",
        facts(history, held_out, read_best(run_dir)),
        section("Is it getting better?", curves(history, held_out, scores)),
        section("Scores by validation", score_table(scores)),
        section("Samples through time (object removed)", samples(folder / "samples", settings["validation_image"])),
        section("Checkpoints on disk", checkpoints(run_dir, held_out)),
        section("Speed and memory", resources(history)),
        section("Newest contact sheet", newest_sheet(folder / "samples")),
        section("Settings", settings_tables(starts)),
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    output = Path(output) if output else run_dir / "report.html"
    output.write_text(page + "".join(body) + "</html>\n")
    return output


def numbers(rows):
    """CSV rows with numbers where there are some."""
    return [{key: as_number(value) for key, value in row.items()} for row in rows]


def as_number(text):
    try:
        return float(text)
    except ValueError:
        return text


def average_by_step(rows):
    """{step: mean scores over the videos}, in the order of steps."""
    by_step = defaultdict(dict)
    for row in rows:
        by_step[int(row["step"])][row["number"]] = row
    return {step: average(list(videos.values())) for step, videos in sorted(by_step.items())}


def points(rows, name):
    return [(row["step"], row[name]) for row in rows]


def section(title, content):
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def facts(history, held_out, best):
    last = history[-1]
    entries = [
        ("step", f"{last['step']:.0f}"),
        ("training loss, mean", f"{smooth(points(history, 'loss'))[-1][1]:.4f}"),
    ]
    if held_out:
        start, now = held_out[0]["held_out_loss"], held_out[-1]["held_out_loss"]
        entries.append(("held-out loss", f"{now:.4f} ({now / start:.3f} of its start)"))
    if best:
        entries.append(("best by held-out loss", f"{best['checkpoint']} ({best['held_out_loss']:.4f})"))
    entries += [("s/step", f"{last['seconds_per_step']:.2f}"), ("peak memory", f"{last['peak_gib']:.1f} GiB")]
    return '<div class="facts">' + "".join(f"<div>{escape(k)}<b>{escape(v)}</b></div>" for k, v in entries) + "</div>"


def curves(history, held_out, scores):
    loss = points(history, "loss")
    charts = [
        chart("held-out loss: comparable from step to step", [("", RED, points(held_out, "held_out_loss"))]),
        chart("training loss: at random timesteps", [("logged", PALE, loss), ("mean", BLUE, smooth(loss))]),
    ]
    for name, meaning in (
        ("psnr_hole", "dB, higher is better"),
        ("ssim_hole", "higher is better"),
        ("warp_hole", "flicker, lower is better"),
    ):
        series = [(step, means[name]) for step, means in scores.items()]
        charts.append(chart(f"{SCORES[name][0]}: {meaning}", [("", GREEN, series)], from_zero=False))
    charts.append(chart("learning rate", [("", BLUE, points(history, "lr"))]))
    return '<div class="charts">' + "".join(charts) + "</div>"


def resources(history):
    memory = chart("peak memory, GiB", [("", BLUE, points(history, "peak_gib"))])
    speed = chart("seconds per step", [("", BLUE, points(history, "seconds_per_step"))])
    return f'<div class="charts">{speed}{memory}</div>'


def smooth(series):
    """Running mean of (step, value), corrected for its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for step, value in series:
        if math.isfinite(value):
            total, weight = SMOOTHING * total + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        smoothed.append((step, total / weight if weight else math.nan))
    return smoothed


def chart(title, series, from_zero=True):
    """An SVG line chart of [(label, colour, [(step, value)])]; nothing where there is no number."""
    series = [(label, colour, [p for p in values if math.isfinite(p[1])]) for label, colour, values in series]
    steps = [step for _, _, values in series for step, _ in values]
    values = [value for _, _, values in series for _, value in values]
    if not values:
        return ""
    x_ticks = ticks(0, max(steps))
    y_ticks = ticks(0 if from_zero else min(values), max(values))
    right, low, high = max(max(steps), x_ticks[-1]), y_ticks[0], y_ticks[-1]

    def place(step, value):
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / right
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = []
    for tick in y_ticks:
        _, y = place(0, tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, y = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick:g}</text>')
    for _, colour, points in series:
        placed = [(*place(step, value), step, value) for step, value in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in placed)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, step, value in placed if len(placed) <= MOST_DOTS else ():
            dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
            parts.append(f"{dot}<title>step {step:g}: {value:.4g}</title></circle>")
    legend = ", ".join(f'<span style="color:{colour}">{escape(label)}</span>' for label, colour, _ in series if label)
    caption = escape(title) + (f" ({legend})" if legend else "")
    drawing = f'<svg width="{WIDTH}" height="{HEIGHT}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def ticks(low, high):
    """About five round numbers from at most `low` to at least `high`."""
    span = high - low or abs(high) or 1
    size = 10 ** math.floor(math.log10(span / 4))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= span / 5)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(i * size, 12) for i in range(first, max(last, first + 1) + 1)]


def score_table(scores):
    if not scores:
        return ""
    shown = list(scores)[:: max(1, math.ceil(len(scores) / 12))]
    shown += [] if shown[-1] == list(scores)[-1] else [list(scores)[-1]]
    head = "".join(f'<th class="n">{escape(heading)}</th>' for heading, _ in SCORES.values())
    rows = [
        f'<tr><td class="n">{step}</td>'
        + "".join(f'<td class="n">{scores[step][name]:.{decimals}f}</td>' for name, (_, decimals) in SCORES.items())
        + "</tr>"
        for step in shown
    ]
    note = '<p class="muted">Synthetic holes over known content, known pixels pasted back. E_warp in thousandths.</p>'
    return f'<table><tr><th class="n">step</th>{head}</tr>{"".join(rows)}</table>{note}'


def list_samples(folder):
    """[(step, folder)] of the validations, oldest first."""
    return sorted((int(path.name.partition("-")[2]), path) for path in folder.glob("sample-*"))


def samples(folder, videos):
    """A table of the GIFs: one row per video, one column per validation."""
    validations = list_samples(folder)
    if not validations:
        return ""
    chosen = np.unique(np.linspace(0, len(validations) - 1, SAMPLES).round().astype(int))
    validations = [validations[i] for i in chosen]
    head = "".join(f"<th>step {step}</th>" for step, _ in validations)
    rows = []
    for n, video in enumerate(videos, start=1):
        cells = []
        for _, path in validations:
            image = animation(path / f"{n}.gif")
            cells.append(f"<td>{image}</td>" if image else '<td class="muted">none</td>')
        rows.append(f"<tr><th>{escape(Path(video).name)}</th>{''.join(cells)}</tr>")
    return f'<div class="samples"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def animation(path):
    """A GIF as an <img> of its own, shrunk: a page of many stays a few megabytes. Nothing where it cannot be read."""
    try:
        with Image.open(path) as gif:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]
            duration = gif.info.get("duration", 125)
    except UNREADABLE:
        return ""
    for frame in frames:
        frame.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
    content = io.BytesIO()
    frames[0].save(content, "webp", save_all=True, append_images=frames[1:], duration=duration, loop=0, quality=80)
    return embed(content.getvalue(), "webp", f'width="{frames[0].width}"')


def embed(content, kind, attributes):
    return f'<img {attributes} src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def newest_sheet(folder):
    for _, path in reversed(list_samples(folder)):
        try:
            content = (path / CONTACT_SHEET).read_bytes()
            Image.open(io.BytesIO(content)).load()
        except UNREADABLE:  # missing, or being written
            continue
        return embed(content, "png", 'class="sheet"')
    return ""


def checkpoints(run_dir, held_out):
    losses = {row["step"]: row["held_out_loss"] for row in held_out}
    best = read_best(run_dir)
    rows = []
    for step, folder in list_checkpoints(run_dir):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        loss = f"{losses[step]:.4f}" if step in losses else ""
        mark = '<span class="best">best</span>' if best and best["checkpoint"] == folder.name else ""
        rows.append(f'<tr><td>{folder.name}</td><td class="n">{size / 1e9:.2f} GB</td><td class="n">{loss}</td>'
                    f"<td>{mark}</td></tr>")  # fmt: skip
    if best and not Path(run_dir, best["checkpoint"]).is_dir():
        cells = f'<td class="muted">{best["checkpoint"]}</td><td class="muted">deleted</td>'
        cells += f'<td class="n">{best["held_out_loss"]:.4f}</td><td><span class="best">best</span></td>'
        rows.append(f"<tr>{cells}</tr>")
    head = '<tr><th></th><th class="n">size</th><th class="n">held-out loss</th><th></th></tr>'
    return f"<table>{head}{''.join(rows)}</table>" if rows else "none yet"


def settings_tables(starts):
    """The newest start's settings; earlier ones' commands."""
    last = starts[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    rows = "".join(f"<tr><td>{escape(k)}</td><td><code>{escape(str(v))}</code></td></tr>"
                   for k, v in sorted(last["settings"].items()))  # fmt: skip
    text = f"<p>started {len(starts)} time(s); {escape(versions)}</p>"
    text += f"<p><code>{escape(' '.join(last['command']))}</code></p>"
    return f"{text}<details><summary>all settings</summary><table>{rows}</table></details>"


@one_line_errors
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run_dir", help="a run's output folder, such as finetune-stage1")
    parser.add_argument("--output", metavar="FILE", help="where to write (default: report.html in that folder)")
    options = parser.parse_args(argv)
    print(write_report(options.run_dir, options.output))


if __name__ == "__main__":
    main()
