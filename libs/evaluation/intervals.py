"""Whether one set of weights is better than another: the 95 % interval of a mean difference, and a verdict in words.

Differences are (videos, seeds): a score of the one minus that of the other, on the same video, hole and noise, of two
runs with the same seed. Both videos and seeds are samples: another set of either would give another mean.
"""

import itertools
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Comparison(NamedTuple):
    mean: float
    low: float  # of the interval
    high: float
    wins: int  # videos whose mean over the seeds is better
    videos: int
    seeds: int
    verdict: str


def compare(differences, higher_is_better=True, unit="", decimals=2):
    """The Comparison of differences (videos, seeds); videos with a nan are left out."""
    differences = np.asarray(differences, float)
    differences = differences[np.isfinite(differences).all(axis=1)]
    videos, seeds = differences.shape
    low, high = paired_interval(differences)
    mean = float(differences.mean()) if videos else float("nan")
    sign = 1 if higher_is_better else -1
    wins = int((sign * differences.mean(axis=1) > 0).sum())
    found = f"no difference that {videos} videos can show"
    if low > 0 or high < 0:
        found = "better" if sign * mean > 0 else "worse"
    interval = f"[{low:+.{decimals}f}, {high:+.{decimals}f}]"
    verdict = f"{found}: {mean:+.{decimals}f}{unit} {interval}, better in {wins} of {videos} videos, seeds: {seeds}"
    if videos < 2:
        verdict = f"nothing can be said from {videos} video(s): {mean:+.{decimals}f}{unit}, seeds: {seeds}"
    return Comparison(mean, low, high, wins, videos, seeds, verdict)


def paired_interval(differences):
    """(low, high) that hold the true mean difference in a share LEVEL of all experiments; nan for under two videos.

    The t interval of a mean over two crossed samples: the variances of videos, seeds and the rest are told apart by a
    two-way analysis of variance, and their sum has Satterthwaite's degrees of freedom
    (https://doi.org/10.2307/3002019). With one seed it is the paired t interval over videos, which says nothing about
    other seeds.

    A percentile bootstrap holds the truth too seldom, as three seeds are too few to resample. Of simulated differences
    of 24 videos and three seeds (spread of videos 0.4, of seeds 0.05, 0.1 and 0.2, of the rest 0.3), this interval held
    it in 96, 96 and 94 %; a bootstrap over videos in 92, 87 and 76 %, over both in 95, 94 and 89 %.
    """
    videos, seeds = differences.shape
    if videos < 2:
        return float("nan"), float("nan")
    mean, of_video, of_seed = differences.mean(), differences.mean(axis=1), differences.mean(axis=0)
    between_videos = seeds * of_video.var(ddof=1)  # mean squares
    total, freedom = between_videos, videos - 1
    if seeds > 1:
        between_seeds = videos * of_seed.var(ddof=1)
        rest = ((differences - of_video[:, None] - of_seed + mean) ** 2).sum() / ((videos - 1) * (seeds - 1))
        # Either sample can only add to the variance, however small it comes out by chance.
        total = max(between_videos + between_seeds - rest, between_videos, between_seeds)
        parts = between_videos**2 / (videos - 1) + between_seeds**2 / (seeds - 1) + rest**2 / (videos - 1) / (seeds - 1)
        freedom = max(total**2 / parts if parts else 1, min(videos, seeds) - 1)
    from scipy import stats  # half a second that a trainer's start does without

    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(total / (videos * seeds))
    return float(mean - half), float(mean + half)


def compare_all(values, first, others, tasks, scores):
    """[{task, method, score, baseline, and what a Comparison holds}] of what two methods have in common.

    Args:
        values: {(method, task, score): {(video, seed): value}}.
        first, others: names of methods; others are compared with the first, whose mean is the baseline.
        scores: {score: metrics.Score}.
    """
    rows = []
    for task, method, (name, score) in itertools.product(tasks, others, scores.items()):
        one, other = values.get((first, task, name), {}), values.get((method, task, name), {})
        videos, seeds = (sorted({key[i] for key in one.keys() & other.keys()}) for i in (0, 1))
        pairs = np.array([(one[key], other[key]) for key in itertools.product(videos, seeds)])
        pairs = pairs.reshape(len(videos), len(seeds), 2)
        pairs = pairs[np.isfinite(pairs).all(axis=(1, 2))]
        if len(pairs):
            found = compare(pairs[..., 1] - pairs[..., 0], score.higher_is_better, score.unit, score.decimals)
            baseline = float(pairs[..., 0].mean())
            rows.append({"task": task, "method": method, "score": name, "baseline": baseline, **found._asdict()})
    return rows


def markdown(rows, first, scores):
    """Lines: a table for every task and score of `compare_all`."""
    lines = [f"Differences from {first}, 95 % intervals over videos and seeds: one in twenty misses the truth."]
    for task, name in dict.fromkeys((row["task"], row["score"]) for row in rows):
        chosen = [row for row in rows if (row["task"], row["score"]) == (task, name)]
        score = scores[name]
        baseline = f"{chosen[0]['baseline']:.{score.decimals}f}{score.unit}"
        lines += ["", f"| {task} | {score.heading}: {first} has {baseline} |", "|---|---|"]
        lines += [f"| {row['method']} | {row['verdict']} |" for row in chosen]
    return lines
