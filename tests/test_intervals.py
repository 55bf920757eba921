"""Intervals of paired differences: against scipy, by hand, and how often they hold the truth."""

import numpy as np
import pytest
from scipy import stats

from libs.evaluation.intervals import compare, paired_interval


def simulate(rng, sets, videos, seeds=3, video_spread=0.4, seed_spread=0.05, rest=0.3):
    """(sets, videos, seeds) of differences whose true mean is 0: what videos, seeds and chance add."""
    of_video = video_spread * rng.normal(size=(sets, videos, 1))
    of_seed = seed_spread * rng.normal(size=(sets, 1, seeds))
    return of_video + of_seed + rest * rng.normal(size=(sets, videos, seeds))


def test_one_seed_and_many_videos_agree_with_scipys_bootstrap():
    differences = np.random.default_rng(0).normal(0.2, 0.5, (60, 1))
    found = stats.bootstrap((differences[:, 0],), np.mean, method="BCa", rng=1).confidence_interval
    assert paired_interval(differences) == pytest.approx(found, abs=0.05 * (found.high - found.low))


def test_seeds_that_agree_but_for_chance_come_to_scipys_bootstrap_of_their_means():
    """Plain methods under holes that follow from the seed: nothing is the same in all videos of a seed."""
    differences = simulate(np.random.default_rng(4), 1, 60, seed_spread=0)[0] + 0.2
    found = stats.bootstrap((differences.mean(axis=1),), np.mean, method="BCa", rng=1).confidence_interval
    low, high = paired_interval(differences)
    assert (low, high) == pytest.approx(found, abs=0.08 * (found.high - found.low))
    once = paired_interval(np.repeat(differences[:, :1], 3, axis=1))  # the same for every seed: as of one
    assert once == pytest.approx(paired_interval(differences[:, :1]))


def test_two_videos_and_two_seeds_by_hand():
    """Mean 2.5; mean squares: videos 4, seeds 1, rest 0; variance (4 + 1) / 4; 25 / 17 degrees of freedom."""
    half = stats.t.ppf(0.975, 25 / 17) * 1.25**0.5
    assert paired_interval(np.array([[1.0, 2.0], [3.0, 4.0]])) == pytest.approx((2.5 - half, 2.5 + half))


@pytest.mark.parametrize("videos", [12, 24, 50])
def test_nineteen_of_twenty_intervals_hold_the_truth(videos):
    """Of three seeds. The usual bootstrap over videos holds it too seldom: it knows of one set of seeds only."""
    sets = simulate(np.random.default_rng(7), 2000, videos)
    held = np.mean([low <= 0 <= high for low, high in map(paired_interval, sets)])
    usual = stats.bootstrap((sets[:500].mean(axis=2),), np.mean, axis=1, n_resamples=500, method="percentile", rng=2)
    low, high = usual.confidence_interval
    assert 0.93 <= held <= 0.97
    assert np.mean((low <= 0) & (high >= 0)) < 0.93


@pytest.mark.parametrize("values", [{"video_spread": 0.0, "seed_spread": 0.0}, {"seed_spread": 0.2}])
def test_intervals_stay_honest_where_seeds_matter_and_where_nothing_does(values):
    sets = simulate(np.random.default_rng(3), 1000, 24, **values)
    assert np.mean([low <= 0 <= high for low, high in map(paired_interval, sets)]) > 0.93


def test_verdicts():
    gain = np.array([[0.2, 0.3], [0.1, 0.2], [0.3, 0.2], [0.2, 0.1], [np.nan, 9.0]])  # the last is left out
    found = compare(gain, unit=" dB")
    assert (found.videos, found.seeds, found.wins) == (4, 2, 4)
    interval = f"[{found.low:+.2f}, {found.high:+.2f}]"
    assert found.verdict == f"better: +0.20 dB {interval}, better in 4 of 4 videos, seeds: 2"
    assert compare(gain, higher_is_better=False).verdict.startswith("worse: +0.20 [") and found.low > 0
    assert compare(gain, higher_is_better=False).wins == 0
    assert compare(-gain, higher_is_better=False).verdict.startswith("better: -0.20 [")
    unclear = compare(np.array([[1.0], [-0.8], [0.3]]))
    assert unclear.verdict.startswith("no difference that 3 videos can show: +0.17 [-") and unclear.wins == 2
    finer = compare(gain / 100, decimals=4)
    assert finer.verdict.startswith(f"better: +0.0020 [{finer.low:+.4f}, {finer.high:+.4f}], better in 4 of 4")
    alone = compare(np.array([[1.0, 2.0]]), unit=" dB")
    assert np.isnan(alone.low) and alone.verdict == "nothing can be said from 1 video(s): +1.50 dB, seeds: 2"
