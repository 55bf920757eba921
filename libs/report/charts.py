"""Line charts for the report page, which draws them: values, ticks, and where both lie in the drawing."""

import math
from dataclasses import dataclass

SMOOTHING = 0.9  # of the loss's running mean
MOST_DOTS = 60  # points of a line that get a dot each


@dataclass
class Line:
    points: list  # [(step, value)]
    colour: str = "blue"  # a variable of the page's style
    label: str = ""  # in the legend

    def __post_init__(self):
        self.points = [(step, value) for step, value in self.points if math.isfinite(value)]
        self.dots = self.points if len(self.points) <= MOST_DOTS else []


class Chart:
    """Values over steps; the step axis starts at 0, the value axis where `from_zero` says so."""

    width, height = 460, 230
    left, right, top, bottom = 56, 446, 14, 196  # of the area inside the axes, in pixels

    def __init__(self, title, *lines, from_zero=True):
        self.title, self.lines = title, lines
        points = [point for line in lines for point in line.points]
        self.empty = not points
        if points:
            steps, values = zip(*points, strict=True)
            self.x_ticks = ticks(0, max(steps))
            self.y_ticks = ticks(0 if from_zero else min(values), max(values))

    def x(self, step):
        return round(self.left + (self.right - self.left) * step / self.x_ticks[-1], 1)

    def y(self, value):
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(self.bottom - (self.bottom - self.top) * (value - low) / (high - low), 1)


def ticks(low, high):
    """About five round numbers from at most `low` to at least `high`."""
    span = high - low
    if span <= 1e-9 * abs(high):  # equal, but for rounding
        span = abs(high) or 1
    exponent = math.floor(math.log10(span / 4))
    size = 10**exponent
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= span / 5)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(i * size, -exponent) for i in range(first, max(last, first + 1) + 1)]


def smooth(points):
    """Running mean of [(step, value)], corrected for its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for step, value in points:
        if math.isfinite(value):
            total, weight = SMOOTHING * total + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        smoothed.append((step, total / weight if weight else math.nan))
    return smoothed
