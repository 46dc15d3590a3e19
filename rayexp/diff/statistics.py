"""Statistics of paired judgements: the same n samples, judged twice.

    gained   wrong in A, right in B        lost   right in A, wrong in B

`scipy.special` gives the distributions. `scipy.stats` would give the same numbers (the tests compare), but importing
it takes longer than everything else that `rayexp diff` does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
POWER = 0.80
NODES = 128  # of the quadrature: limits are right to 0.00002


def mcnemar(gained: ArrayLike, lost: ArrayLike) -> NDArray[np.float64]:
    """Exact two-sided McNemar test, element by element.

    Of the gained + lost discordant pairs, each is a gain with probability 1/2 where A and B are equally accurate:
    p = min(1, 2 * P(X <= min(gained, lost))), X ~ Binomial(gained + lost, 1/2). Not the mid-p variant, so never
    below the nominal level. Q. McNemar, Psychometrika 12 (1947) 153; exact form: A. Agresti, Categorical Data
    Analysis, section 11.1.
    """
    from scipy.special import bdtr

    b, c = np.asarray(gained, dtype=np.int64), np.asarray(lost, dtype=np.int64)
    return np.minimum(1.0, 2 * np.asarray(bdtr(np.minimum(b, c), b + c, 0.5), dtype=np.float64))


def difference_interval(gained: int, lost: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval of accuracy(B) - accuracy(A) as fractions in [-1, 1], for n pairs, that agrees with `mcnemar`.

    It holds 0 if and only if the exact test's p is at least 1 - level, so the verdict that reads the interval and the
    p that is printed beside it are one test. M. P. Fay, K. Lumbard, Statistics in Medicine 40 (2021) 1147: the
    difference is psi (2 theta - 1), psi the share of discordant pairs and theta the share of gains among them; the
    limit is a quantile of that product, both factors drawn from the confidence distributions (Beta) behind their
    Clopper-Pearson intervals. Its coverage is not below the nominal level (the tests enumerate small n).
    """
    if n < 1:
        raise ValueError("n must be at least 1")
    lower = _lower_limit(gained, lost, n, level)
    return lower, 0.0 - _lower_limit(lost, gained, n, level)


def _lower_limit(gained: int, lost: int, n: int, level: float) -> float:
    from scipy.special import betainc, betaincinv

    m, tail = gained + lost, (1 - level) / 2
    if gained == 0:  # theta may be 0, so the limit is that of psi
        return -float(betaincinv(m + 1, n - m, 1 - tail)) if m < n else -1.0
    # P(the limit is positive) is decided by theta alone, and there by the exact test.
    above = gained > lost and mcnemar(gained, lost) < 1 - level
    # The larger psi, the further from 0: above 0 the small psi is the cautious one, below 0 the large psi.
    a, b = (m, n - m + 1) if above else (m + 1, n - m)
    at, weight = _gauss(NODES)
    psi = betaincinv(a, b, at) if b else np.ones(NODES)

    def excess(d: float) -> float:
        """P(psi (2 theta - 1) <= d) above the tail; rises with d."""
        return float(weight @ betainc(gained, lost + 1, np.clip(0.5 + d / (2 * psi), 0.0, 1.0))) - tail

    return _root(excess, 0.0, 1.0) if above else _root(excess, -1.0, 0.0)


@functools.cache
def _gauss(count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function passes 0 in [low, high]; an end where it does not (Illinois method)."""
    below, above = rising(low), rising(high)
    if below >= 0 or above <= 0:
        return low if below >= 0 else high
    side = 0
    while high - low > 1e-10:
        middle = high - above * (high - low) / (above - below)
        if not low < middle < high:
            break
        value = rising(middle)
        if value < 0:
            low, below = middle, value
            above /= 2 if side < 0 else 1
            side = -1
        else:
            high, above = middle, value
            below /= 2 if side > 0 else 1
            side = 1
        if abs(value) < 1e-13:
            return middle
    return (low + high) / 2


def power(discordant_share: float, difference: float, n: int, level: float = LEVEL) -> float:
    """How often the exact test of n pairs is significant, where a share of them is discordant and B is more accurate
    by `difference` (a fraction, at most that share). Summed over every count of discordant pairs that can occur.
    """
    from scipy.special import bdtr, bdtrik

    theta = (1 + min(1.0, difference / discordant_share)) / 2
    spread = 9 * math.sqrt(n * discordant_share * (1 - discordant_share)) + 1
    centre = n * discordant_share
    m = np.arange(max(0, math.floor(centre - spread)), min(n, math.ceil(centre + spread)) + 1)
    below = bdtr(m[0] - 1, n, discordant_share) if m[0] else 0.0
    weight = np.diff(bdtr(m, n, discordant_share), prepend=below)
    # The largest smaller count k that is significant, 2 P(X <= k) < 1 - level, where there is one.
    k = np.floor(np.nan_to_num(bdtrik((1 - level) / 2, m, 0.5)))
    found = np.where(2 * bdtr(k, m, 0.5) < 1 - level, bdtr(k, m, theta) + bdtr(k, m, 1 - theta), 0.0)
    return float((weight * found).sum())


def detectable_difference(discordant: int, n: int, level: float = LEVEL, wanted: float = POWER) -> float | None:
    """Smallest true difference in accuracy (a fraction) that the exact McNemar test finds with that power.

    The share of discordant pairs is taken as observed, their number varies from sample to sample (see `power`). None
    where even the largest difference that the share allows (all discordant pairs on one side) would not be found.
    """
    psi = discordant / n
    if psi == 0 or power(psi, psi, n, level) < wanted:
        return None
    low, high = 0.0, psi
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if power(psi, middle, n, level) < wanted else (low, middle)
    return high


def adjust(p: ArrayLike) -> NDArray[np.float64]:
    """Adjusted p-values under control of the false discovery rate.

    Y. Benjamini, Y. Hochberg, J. R. Statist. Soc. B 57 (1995) 289: calling every class below q changed is wrong in
    a share of at most q of these calls, on average. (scipy.stats.false_discovery_control is the same.)
    """
    values = np.asarray(p, dtype=np.float64)
    m = len(values)
    order = np.argsort(values, kind="stable")
    stepped = values[order] * m / np.arange(1, m + 1)
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(stepped[::-1])[::-1])
    return adjusted


@dataclass(frozen=True, slots=True)
class DropVerdict:
    """May B replace A? `word` is PASS, FAIL or INCONCLUSIVE; `why` says what decided."""

    word: str
    why: str


def verdict(
    interval: tuple[float, float] | None,
    max_drop: float,
    *,
    equal: bool,
    n: int,
    not_finite: tuple[int, int],
    level: float = LEVEL,
    letter: str = "B",
) -> DropVerdict:
    """May B replace A if a fall by `max_drop` is allowed (same unit as the interval)?

    PASS: the whole interval of B - A lies above -max_drop. FAIL: the whole interval lies below. Else the data do
    not decide. (Non-inferiority by confidence interval: ICH E9, section 3.3.2.) Before that: a B that is not finite
    fails, nothing can be held against an A that is not, and equal judgements need no statistics.

    Args:
        interval: of B - A; None where there is none.
        max_drop: at least 0.
        equal: A and B say the same of every sample.
        n: samples of each side.
        not_finite: how many of them have no judgement, in A and in B.
        level: of the interval.
        letter: what B is called.
    """
    for side, count, word in ((letter, not_finite[1], "FAIL"), ("A", not_finite[0], "INCONCLUSIVE")):
        if count:
            return DropVerdict(word, f"{count:,} of the {n:,} judgements of {side} are not finite")
    if equal:
        return DropVerdict("PASS", f"A and {letter} say the same of every sample")
    if interval is None:
        return DropVerdict("INCONCLUSIVE", "there is no interval")
    low, high = interval
    which = f"the {100 * level:.4g} % interval"
    if low > -max_drop:
        return DropVerdict("PASS", f"{which} lies within what is allowed")
    if high < -max_drop:
        return DropVerdict("FAIL", f"{which} lies beyond what is allowed")
    return DropVerdict("INCONCLUSIVE", f"{which} holds what is allowed and what is not")
