"""The statistics against scipy.stats, brute force, published tables and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rayexp.analysis.paired import adjust, detectable_difference, difference_interval, mcnemar, plain, verdict

counts = st.integers(0, 400)


def test_mcnemar_by_hand():
    # 1 gained, 7 lost: P(X <= 1) = (1 + 8) / 256, doubled
    assert mcnemar(1, 7) == pytest.approx(18 / 256, abs=1e-15)
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar([0, 3], [1, 0]).tolist() == pytest.approx([1, 0.25])


@given(counts, counts)
def test_mcnemar_is_the_binomial_test(b, c):
    expected = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_interval_published():
    # Airway hyper-responsiveness of Bentur et al. (2009): 1 and 7 discordant pairs of 21; Tango's interval in
    # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014) 2850 is -0.517 to -0.026.
    low, high = difference_interval(1, 7, 21)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)


def test_interval_without_discordant_pairs():
    # the limits are +- z^2 / (n + z^2)
    z2 = scipy.stats.norm.ppf(0.975) ** 2
    assert difference_interval(0, 0, 50) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)), abs=1e-9)


@pytest.mark.parametrize(("b", "c", "n"), [(40, 20, 160), (3, 9, 40), (0, 6, 30), (12, 0, 25), (700, 400, 2000)])
def test_interval_by_brute_force(b, c, n):
    """At both ends the score statistic, with the nuisance probability fitted numerically, is the normal quantile."""
    z = scipy.stats.norm.ppf(0.975)
    for d in difference_interval(b, c, n):
        # p12 = q + d, p21 = q; the rest has 1 - 2q - d
        def negative(q, d=d):
            parts = [(b, q + d), (c, q), (n - b - c, 1 - 2 * q - d)]
            return -sum(k * math.log(p) if k else 0.0 for k, p in parts if k or p)

        lowest, highest = max(0.0, -d) + 1e-12, (1 - d) / 2 - 1e-12
        q = scipy.optimize.minimize_scalar(negative, bounds=(lowest, highest), options={"xatol": 1e-12}).x
        statistic = (b - c - n * d) / math.sqrt(n * (2 * q + d - d * d))
        assert abs(statistic) == pytest.approx(z, rel=2e-3)


@given(counts, counts, st.integers(0, 400))
def test_interval_properties(b, c, rest):
    n = b + c + rest
    if not n:
        with pytest.raises(ValueError, match="at least 1"):
            difference_interval(b, c, n)
        return
    low, high = difference_interval(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert difference_interval(c, b, n) == pytest.approx((-high, -low), abs=1e-9)
    # at zero the score test is McNemar's without continuity correction
    if b + c and abs((b - c) ** 2 / (b + c) - 3.8414588) > 1e-4:
        assert (low > 0 or high < 0) == ((b - c) ** 2 / (b + c) > 3.8414588)


def test_interval_covers():
    """Simulated coverage is near 95 %."""
    rng = np.random.default_rng(5)
    n, gain, loss = 300, 0.12, 0.07
    drawn = rng.multinomial(n, [gain, loss, 1 - gain - loss], size=2000)
    hits = 0
    for b, c, _ in drawn.tolist():
        low, high = difference_interval(b, c, n)
        hits += low <= gain - loss <= high
    assert 0.935 <= hits / 2000 <= 0.965


@pytest.mark.parametrize(("discordant", "n"), [(60, 160), (300, 1000), (3000, 10_000), (90, 10_000)])
def test_detectable_solves_the_sample_size_formula(discordant, n):
    d, psi = detectable_difference(discordant, n), discordant / n
    a, b = scipy.stats.norm.ppf([0.975, 0.8])
    assert (a * math.sqrt(psi) + b * math.sqrt(psi - d * d)) ** 2 / d**2 == pytest.approx(n, rel=1e-9)


def test_detectable_is_found_in_simulation():
    n, psi = 2000, 0.25
    d = detectable_difference(int(n * psi), n)
    rng = np.random.default_rng(3)
    drawn = rng.multinomial(n, [(psi + d) / 2, (psi - d) / 2, 1 - psi], size=4000)
    power = (mcnemar(drawn[:, 0], drawn[:, 1]) < 0.05).mean()
    assert 0.75 < power < 0.83


def test_detectable_where_nothing_can_be_found():
    assert detectable_difference(0, 100) is None
    assert detectable_difference(3, 100) is None  # three of three on one side have p = 0.25


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_adjust_is_benjamini_hochberg(p):
    assert adjust(p) == pytest.approx(scipy.stats.false_discovery_control(p), abs=1e-12)


def test_adjust_by_hand():
    assert adjust([0.01, 0.04, 0.03, 0.5]).tolist() == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])


@pytest.mark.parametrize(
    ("interval", "max_drop", "expected"),
    [
        ((-0.5, 0.5), 1, "PASS"),
        ((-2, -1.5), 1, "FAIL"),
        ((-1.5, 0.5), 1, "INCONCLUSIVE"),
        ((-1, 0.5), 1, "INCONCLUSIVE"),
        ((-2, -1), 1, "INCONCLUSIVE"),
        ((0.1, 2), 0, "PASS"),
        ((-0.1, 2), 0, "INCONCLUSIVE"),
        ((-2, -0.1), 0, "FAIL"),
    ],
)
def test_verdict(interval, max_drop, expected):
    assert verdict(interval, max_drop) == expected


def test_plain_has_no_nan():
    assert plain({"a": (np.float32("nan"), np.int64(3), [math.inf, 1.5])}) == {"a": [None, 3, [None, 1.5]]}
