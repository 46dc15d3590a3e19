"""The statistics against scipy.stats, enumeration of all small tables, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from rayexp.diff.statistics import _root, adjust, detectable_difference, difference_interval, mcnemar, power, verdict

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


def tables(largest):
    """Every (gained, lost) of up to so many discordant pairs."""
    return [(b, m - b) for m in range(largest + 1) for b in range(m + 1)]


def test_interval_and_exact_test_agree_on_every_small_table():
    """The interval holds 0 if and only if scipy's exact p is at least 5 %, and so does the verdict at --max-drop 0."""
    for b, c in tables(20):
        p = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
        for n in {max(1, b + c), b + c + 1, 1000}:
            low, high = difference_interval(b, c, n)
            assert (low <= 0 <= high) == (p >= 0.05), (b, c, n)
            if p < 0.05:
                assert (low > 0) == (b > c), (b, c, n)
            found = verdict((low, high), 0, equal=False, n=n, not_finite=(0, 0)).word
            assert found == ("INCONCLUSIVE" if p >= 0.05 else "PASS" if b > c else "FAIL"), (b, c, n)


@settings(deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_interval_and_exact_test_agree_on_large_tables(b, c):
    low, high = difference_interval(b, c, 10_000)
    assert (low <= 0 <= high) == (mcnemar(b, c) >= 0.05)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_interval_follows_its_level(level):
    for b, c in tables(12):
        low, high = difference_interval(b, c, 40, level)
        assert (low <= 0 <= high) == (mcnemar(b, c) >= 1 - level)


@pytest.mark.parametrize(
    ("b", "c", "n"), [(5, 0, 100), (1, 7, 21), (40, 20, 160), (12, 2, 30), (2, 2, 10), (700, 400, 2000)]
)
def test_interval_by_integration(b, c, n):
    """At each limit, the product of the two confidence variables lies beyond it with 2.5 %, integrated over psi."""

    def beyond(b, c, d):
        m = b + c
        psi = scipy.stats.beta(m, n - m + 1) if d >= 0 else scipy.stats.beta(m + 1, n - m)
        theta = scipy.stats.beta(b, c + 1) if b else None

        def integrand(t):
            share = theta.cdf(0.5 + d / (2 * t)) if theta else float(-t <= d)
            return share * psi.pdf(t)

        points = sorted({m / n, min(1.0, abs(d))})
        return scipy.integrate.quad(integrand, 0, 1, points=points, limit=500)[0]

    low, high = difference_interval(b, c, n)
    assert beyond(b, c, low) == pytest.approx(0.025, abs=1e-4)
    if c:
        assert beyond(c, b, -high) == pytest.approx(0.025, abs=1e-4)


def test_interval_without_discordant_pairs():
    # Clopper and Pearson's upper limit of a share of which none of 50 was seen
    limit = scipy.stats.binomtest(0, 50).proportion_ci(method="exact").high
    assert difference_interval(0, 0, 50) == pytest.approx((-limit, limit), abs=1e-12)
    assert difference_interval(0, 7, 50)[0] == pytest.approx(-scipy.stats.binomtest(7, 50).proportion_ci().high)


@settings(deadline=None)
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


def test_interval_covers():
    """Over every table that can occur, weighted by its probability."""
    for n in (5, 12, 20):
        limits = {(b, c): difference_interval(b, c, n) for b, c in tables(n)}
        for gain, loss in [(0.02, 0.02), (0.1, 0.1), (0.3, 0.1), (0.05, 0.6), (0.5, 0.5), (0.0, 0.2), (0.0, 0.02)]:
            chances = scipy.stats.multinomial(n, [gain, loss, 1 - gain - loss])
            covered = sum(
                chances.pmf([b, c, n - b - c]) for (b, c), (low, high) in limits.items() if low <= gain - loss <= high
            )
            assert covered >= 0.95, (n, gain, loss)


def test_interval_is_not_far_too_wide():
    """With many pairs it is that of the normal approximation."""
    b, c, n = 1200, 900, 10_000
    low, high = difference_interval(b, c, n)
    wald = 1.96 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert (high - low) / 2 == pytest.approx(wald, rel=0.02)


def power_by_enumeration(psi, d, n):
    """Over every number of discordant pairs and of gains, with scipy's binomial distribution."""
    found = 0.0
    for m in range(n + 1):
        gains = np.arange(m + 1)
        p = np.minimum(1, 2 * scipy.stats.binom.cdf(np.minimum(gains, m - gains), m, 0.5))
        chance = scipy.stats.binom.pmf(gains, m, (1 + d / psi) / 2)
        found += scipy.stats.binom.pmf(m, n, psi) * chance[p < 0.05].sum()
    return found


@pytest.mark.parametrize(
    ("psi", "d", "n"),
    [(0.1, 0.1, 50), (0.3, 0.1, 60), (0.9, 0.2, 60), (1.0, 0.3, 40), (0.02, 0.02, 50), (0.5, 0.0, 30)],
)
def test_power_is_that_of_the_exact_test(psi, d, n):
    assert power(psi, d, n) == pytest.approx(power_by_enumeration(psi, d, n), abs=1e-6)


@pytest.mark.parametrize(("discordant", "n"), [(30, 60), (12, 60), (20, 40)])
def test_detectable_has_the_power_that_it_claims(discordant, n):
    d = detectable_difference(discordant, n)
    assert power_by_enumeration(discordant / n, d, n) == pytest.approx(0.8, abs=1e-4)
    assert detectable_difference(discordant, n, wanted=0.9) > d


def test_detectable_is_found_in_simulation():
    n, psi = 2000, 0.25
    d = detectable_difference(int(n * psi), n)
    rng = np.random.default_rng(3)
    drawn = rng.multinomial(n, [(psi + d) / 2, (psi - d) / 2, 1 - psi], size=20_000)
    found = (mcnemar(drawn[:, 0], drawn[:, 1]) < 0.05).mean()
    assert 0.79 < found < 0.81


def test_detectable_where_nothing_can_be_found():
    assert detectable_difference(0, 100) is None
    assert detectable_difference(3, 100) is None  # three of three on one side have p = 0.25
    assert detectable_difference(6, 100) is None  # six of six would do, but often there are fewer
    assert detectable_difference(10, 100) is not None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_adjust_is_benjamini_hochberg(p):
    assert adjust(p) == pytest.approx(scipy.stats.false_discovery_control(p), abs=1e-12)


def test_adjust_by_its_definition():
    """The adjusted value of p_i is the smallest rate at which Benjamini and Hochberg's step-up calls i changed."""
    rng = np.random.default_rng(0)
    p = rng.random(12) ** 3
    found = adjust(p)
    for rate in rng.random(200):
        passing = [k for k in range(1, 13) if np.sort(p)[k - 1] <= k * rate / 12]
        called = p <= (np.sort(p)[passing[-1] - 1] if passing else -1)
        assert (called == (found <= rate)).all()


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
        (None, 1, "INCONCLUSIVE"),
    ],
)
def test_verdict(interval, max_drop, expected):
    assert verdict(interval, max_drop, equal=False, n=9, not_finite=(0, 0)).word == expected


@pytest.mark.parametrize("interval", [(-5, 5), (1, 2), (-9, -8), None])
def test_equal_judgements_pass_and_what_is_not_finite_never_does(interval):
    assert verdict(interval, 0, equal=True, n=9, not_finite=(0, 0)).word == "PASS"
    for equal in (True, False):
        broken = verdict(interval, 100, equal=equal, n=9, not_finite=(0, 1))
        assert broken.word == "FAIL"
        assert "1 of the 9 judgements of B are not finite" in broken.why
        assert verdict(interval, 100, equal=equal, n=9, not_finite=(9, 9)).word == "FAIL"
        assert verdict(interval, 100, equal=equal, n=9, not_finite=(9, 0)).word == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("rising", "root"), [(lambda x: x, 0.0), (lambda x: x + 1, 0.0), (lambda x: x - 2, 1.0), (lambda x: x - 1, 1.0)]
)
def test_a_root_at_or_beyond_an_end_is_that_end(rising, root):
    assert _root(rising, 0.0, 1.0) == root


# ---------------------------------------------------------------------- coverage, and another interval


def tango(gained, lost, n, level=0.95):
    """T. Tango's score interval, Statistics in Medicine 17 (1998) 891, from its equations: the limits are where the
    score statistic, with q21 estimated under the difference d, is a quantile of the normal distribution."""
    z = scipy.stats.norm.ppf((1 + level) / 2)

    def score(d):
        a, b, c = 2 * n, -gained - lost + (2 * n - gained + lost) * d, -lost * d * (1 - d)
        q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = n * (2 * q + d * (1 - d))
        return (gained - lost - n * d) / math.sqrt(max(variance, 1e-300))

    def limit(sign, end):
        edge = (gained - lost) / n
        return scipy.optimize.brentq(lambda d: score(d) - sign * z, *sorted((edge, end)), xtol=1e-12)

    return limit(1, -1 + 1e-12), limit(-1, 1 - 1e-12)


def test_the_other_interval_is_the_published_one():
    """Airway hyper-responsiveness before and after a transplantation: 1 of 21 lost it and 7 got it. M. Fagerland,
    S. Lydersen, P. Laake, BMC Med. Res. Methodol. 13 (2013) 91, give Tango's interval as -0.517 to -0.026."""
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("b", "c", "n"), [(1, 7, 21), (40, 20, 160), (70, 50, 1000), (400, 300, 10_000)])
def test_the_interval_holds_that_of_tango(b, c, n):
    """That one is approximate and shorter by little, and by less the more there are."""
    low, high = difference_interval(b, c, n)
    shorter_low, shorter_high = tango(b, c, n)
    assert low <= shorter_low < shorter_high <= high
    assert (high - low) / (shorter_high - shorter_low) < (1.3 if n < 100 else 1.15 if n < 5000 else 1.03)


@pytest.mark.parametrize(("n", "gain", "loss"), [(200, 0.1, 0.1), (1000, 0.15, 0.1), (5000, 0.12, 0.12)])
def test_intervals_cover_in_simulation(n, gain, loss):
    rng = np.random.default_rng(12)
    drawn = rng.multinomial(n, [gain, loss, 1 - gain - loss], size=400)
    tables, counts = np.unique(drawn, axis=0, return_counts=True)
    held = {difference_interval: 0, tango: 0}
    for (b, c, _), count in zip(tables.tolist(), counts.tolist(), strict=True):
        for interval in held:
            low, high = interval(b, c, n)
            held[interval] += count * (low <= gain - loss <= high)
    for interval, covered in held.items():
        assert 0.92 <= covered / 400 <= 0.98, interval.__name__


@pytest.mark.parametrize(("n", "share"), [(100, 0.1), (1000, 0.2), (10_000, 0.3)])
def test_the_exact_test_keeps_its_level(n, share):
    """Of models that are equally accurate, at most 5 % differ significantly; with many pairs, nearly 5 %."""
    rng = np.random.default_rng(7)
    drawn = rng.multinomial(n, [share / 2, share / 2, 1 - share], size=20_000)
    rejected = (mcnemar(drawn[:, 0], drawn[:, 1]) < 0.05).mean()
    assert rejected <= 0.053
    assert rejected >= (0.01 if n == 100 else 0.035)
