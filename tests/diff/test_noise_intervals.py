"""The intervals of a noise floor, against examples worked by hand and against simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from rayexp.diff.noise import difference_reach, pair_intervals


def symmetric(upper, m):
    d = np.zeros((m, m))
    d[np.triu_indices(m, 1)] = upper
    return d + d.T


def test_three_seeds_by_hand():
    """Leaving a seed out leaves one pair, so with three seeds J = 2/3 of the pairs' sum of squares Q, and the variance
    of a further pair's distance is Q / 3 + 2 J = 5/3 Q."""
    u, mean, pair = pair_intervals(symmetric([0.30, 0.33, 0.27], 3))
    q, t = 0.03**2 + 0.03**2, scipy.stats.t.ppf(0.975, 2)
    assert u == pytest.approx(0.30)
    assert mean == pytest.approx((0.3 - t * math.sqrt(2 / 3 * q), 0.3 + t * math.sqrt(2 / 3 * q)))
    assert pair == pytest.approx((0.3 - t * math.sqrt(5 / 3 * q), 0.3 + t * math.sqrt(5 / 3 * q)))


def test_the_jackknife_by_loops():
    rng = np.random.default_rng(4)
    m = 6
    d = symmetric(rng.random(15), m)
    pairs = {(i, j): d[i, j] for i, j in itertools.combinations(range(m), 2)}
    u = np.mean(list(pairs.values()))
    pseudo = [m * u - (m - 1) * np.mean([x for pair, x in pairs.items() if k not in pair]) for k in range(m)]
    half = scipy.stats.t.ppf(0.975, m - 1) * scipy.stats.sem(pseudo)
    found, mean, pair = pair_intervals(d)
    assert found == pytest.approx(u)
    assert mean == pytest.approx((u - half, u + half))
    further = np.var(list(pairs.values())) + 2 * scipy.stats.sem(pseudo) ** 2
    assert pair[1] - u == pytest.approx(scipy.stats.t.ppf(0.975, m - 1) * math.sqrt(further))
    assert pair_intervals(d, 0.5)[2][1] < pair[1]


def coverage(draw, m, rounds, seed=0):
    """How often the two intervals hold what they claim: the mean over all seeds, and the churn of a new pair.

    `draw(rng)` gives float64[m + 2, m + 2] of as many seeds, the last two of which are the new pair, and the true mean.
    """
    rng = np.random.default_rng(seed)
    means = pairs = 0
    for _ in range(rounds):
        d, truth = draw(rng, m + 2)
        _, mean, pair = pair_intervals(d[:m, :m])
        means += mean[0] <= truth <= mean[1]
        pairs += pair[0] <= d[m, m + 1] <= pair[1]
    return means / rounds, pairs / rounds


def of_seeds(rng, m):
    """Each seed adds an effect of its own to all of its pairs."""
    effect = rng.normal(0, 0.01, m)
    return 0.3 + effect[:, None] + effect[None, :], 0.3


def of_pairs(rng, m):
    """Each pair has an effect of its own."""
    return symmetric(rng.normal(0.3, 0.01, m * (m - 1) // 2), m), 0.3


SHARES = np.random.default_rng(8).beta(0.5, 0.5, 300)


def of_models(rng, m):
    """Models that answer 300 questions of unlike difficulty, some better than others: D is the share on which two
    differ. Its true mean follows from a thousand drawn models."""
    skill = np.clip(1 + rng.normal(0, 0.15, m), 0, 1.4)
    said = rng.random((m, len(SHARES))) < np.clip(SHARES * skill[:, None], 0, 1)
    return (said[:, None, :] != said[None, :, :]).mean(2), TRUTH


def _true_mean():
    skill = np.clip(1 + np.random.default_rng(9).normal(0, 0.15, 4000), 0, 1.4)
    p = np.clip(SHARES * skill[:, None], 0, 1)
    q = p[np.random.default_rng(10).permutation(len(p))]
    return float((p * (1 - q) + q * (1 - p)).mean())


TRUTH = _true_mean()


@pytest.mark.parametrize(
    ("draw", "m", "low", "high"),
    [
        (of_seeds, 3, 0.935, 0.965),  # exactly 95 %
        (of_seeds, 6, 0.93, 0.97),
        (of_pairs, 3, 0.95, 0.99),
        (of_pairs, 6, 0.95, 0.998),
        (of_models, 3, 0.92, 0.985),
        (of_models, 5, 0.92, 0.985),
        (of_models, 10, 0.92, 0.985),
    ],
)
def test_intervals_cover(draw, m, low, high):
    mean, pair = coverage(draw, m, 1500)
    assert low <= pair <= high, (mean, pair)
    assert 0.92 <= mean <= max(high, 0.99), (mean, pair)


def test_treating_pairs_as_independent_would_not_cover():
    """What the simulation is for: the naive interval, n - 1 = C(m, 2) - 1 degrees of freedom, is found wanting."""
    rng, held = np.random.default_rng(2), 0
    for _ in range(1500):
        d, truth = of_seeds(rng, 6)
        upper = d[np.triu_indices(6, 1)]
        low, high = scipy.stats.t.interval(0.95, len(upper) - 1, upper.mean(), scipy.stats.sem(upper))
        held += low <= truth <= high
    assert held / 1500 < 0.85


def test_difference_of_two_seeds_covers():
    rng, held = np.random.default_rng(3), 0
    for _ in range(3000):
        x = rng.normal(50, 2, 5)
        held += abs(x[3] - x[4]) <= difference_reach(x[:3])
    assert 0.94 <= held / 3000 <= 0.96
