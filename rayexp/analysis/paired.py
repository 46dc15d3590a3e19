"""Statistics of paired judgements: the same n samples, judged twice.

    gained   wrong in A, right in B        lost   right in A, wrong in B

`scipy.special` gives the distributions. `scipy.stats` would give the same numbers (the tests compare), but importing
it takes longer than everything else that `rayexp diff` does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
POWER = 0.80


def normal_quantile(p: float) -> float:
    """z with P(Z <= z) = p for a standard normal Z."""
    from scipy.special import ndtri

    return float(ndtri(p))


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
    """Score interval of accuracy(B) - accuracy(A) as fractions in [-1, 1], for n pairs.

    All d that the score test does not reject: |z(d)| <= quantile. T. Tango, Statistics in Medicine 17 (1998) 891.
    It was made for non-inferiority trials (may B replace A?), holds its level where few pairs are discordant, and
    at d = 0 it is McNemar's test without continuity correction.
    """
    if n < 1:
        raise ValueError("n must be at least 1")
    z = normal_quantile((1 + level) / 2)
    seen = (gained - lost) / n

    def crossing(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(_tango(gained, lost, n, middle)) <= z:
                inside = middle
            else:
                outside = middle
        return inside

    return crossing(seen, -1.0), crossing(seen, 1.0)


def _tango(b: int, c: int, n: int, d: float) -> float:
    """Tango's z for the hypothesis that the difference is d; q is the lost cell's probability, fitted under it."""
    linear = -b - c + (2 * n - b + c) * d
    root = math.sqrt(max(0.0, linear * linear + 8 * n * c * d * (1 - d)))
    q = max(0.0, -d, (root - linear) / (4 * n))
    variance = n * (2 * q + d * (1 - d))
    miss = b - c - n * d
    if variance <= 0:
        return 0.0 if abs(miss) < 1e-12 * n else math.copysign(math.inf, miss)
    return miss / math.sqrt(variance)


def detectable_difference(discordant: int, n: int, level: float = LEVEL, power: float = POWER) -> float | None:
    """Smallest true difference in accuracy (a fraction) that a two-sided McNemar test finds with that power.

    Solved for d from n = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2, psi the share of discordant pairs, taken
    as observed: R. J. Connett, J. A. Smith, R. B. McHugh, Statistics in Medicine 6 (1987) 581, after O. S.
    Miettinen, Biometrics 24 (1968) 339. None where even the largest difference that psi allows (all discordant
    pairs on one side) would not be found.
    """
    psi = discordant / n
    a, b = normal_quantile((1 + level) / 2), normal_quantile(power)
    inside = n + b * b - a * a
    if psi == 0 or inside < 0:
        return None
    d = math.sqrt(psi) * (a * math.sqrt(n) + b * math.sqrt(inside)) / (n + b * b)
    return d if d <= psi else None


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


def verdict(interval: tuple[float, float], max_drop: float) -> str:
    """PASS, FAIL or INCONCLUSIVE: may B replace A if a fall by `max_drop` is allowed (same unit as the interval)?

    PASS: the whole interval of B - A lies above -max_drop. FAIL: the whole interval lies below. Else the data do
    not decide. (Non-inferiority by confidence interval: ICH E9, section 3.3.2.)
    """
    low, high = interval
    if low > -max_drop:
        return "PASS"
    return "FAIL" if high < -max_drop else "INCONCLUSIVE"


def plain(value: Any) -> Any:
    """A value for JSON: numpy's numbers become Python's, NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
