"""The loss of training logs as a picture: every logged line, and the probe loss at fixed clips.

python -m demo.plot_loss finetune-stage1.log finetune-stage2.log --output loss.png
"""

import argparse
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 900, 360, 60
STEP = re.compile(r"step (\d+)/\d+  loss ([\d.]+)")
PROBE = re.compile(r"probe loss ([\d.]+) at step (\d+)")


def read_log(path):
    """([(step, loss)], [(step, probe loss)]) of the last run in a log."""
    lines = Path(path).read_text().splitlines()
    last = max((i for i, line in enumerate(lines) if line.startswith("=====")), default=0)
    steps = [(int(match[1]), float(match[2])) for match in map(STEP.search, lines[last:]) if match]
    probes = [(int(match[2]), float(match[1])) for match in map(PROBE.search, lines[last:]) if match]
    return steps, probes


def plot(logs, output):
    """One panel per log, one below the other."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT * len(logs)), "white")
    for i, log in enumerate(logs):
        sheet.paste(draw_panel(Path(log).stem, *read_log(log)), (0, i * HEIGHT))
    sheet.save(output)


def draw_panel(title, steps, probes):
    panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(14)
    points = steps + probes
    if not points:
        draw.text((MARGIN, MARGIN), f"{title}: no steps in the log", "black", font)
        return panel
    last_step, top = max(step for step, _ in points) or 1, 1.05 * max(loss for _, loss in points)

    def place(step, loss):
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / last_step
        return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * loss / top

    for k in range(5):
        loss, step = top * k / 4, last_step * k / 4
        _, y = place(0, loss)
        x, _ = place(step, 0)
        draw.line([(MARGIN, y), (WIDTH - MARGIN, y)], "#dddddd")
        draw.text((8, y - 8), f"{loss:.2f}", "black", font)
        draw.text((x - 8, HEIGHT - MARGIN + 8), f"{step:.0f}", "black", font)
    draw.text((MARGIN, 16), f"{title}: loss by optimizer step", "black", font)
    draw.text((WIDTH - 330, 16), "training clips", "#7aa6d6", font)
    draw.text((WIDTH - 200, 16), "fixed probe clips", "#c0392b", font)
    if len(steps) > 1:
        draw.line([place(*point) for point in steps], "#7aa6d6", 2)
    if len(probes) > 1:
        draw.line([place(*point) for point in probes], "#c0392b", 3)
    for x, y in (place(*point) for point in probes):
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], "#c0392b")
    return panel


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+")
    parser.add_argument("--output", default="loss.png")
    options = parser.parse_args()
    plot(options.logs, options.output)
