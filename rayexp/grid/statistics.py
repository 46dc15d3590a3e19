"""Statistics of a device grid, as functions of plain numbers: estimates, ratios and scaling laws.

An `Estimate` carries bootstrap replicates, so that a ratio or a sum of estimates has an interval too. Replicates come
from generators with fixed seeds: the same measurements give the same report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
DRAWS = 1000
KEPT = 512  # steps of a repeat that are resampled; longer repeats are summed up to as many blocks
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its bootstrap replicates, float64[DRAWS]."""

    value: float
    draws: Floats

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A number that is given and not measured."""
        return cls(value, np.full(DRAWS, value))

    @property
    def interval(self) -> tuple[float, float]:
        """The percentile interval at 95 % (B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13)."""
        low, high = np.quantile(self.draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def map(self, function: Callable[..., Any], *others: Estimate) -> Estimate:
        """`function` of this estimate and others; it must work on arrays."""
        value = float(function(self.value, *(o.value for o in others)))
        return Estimate(value, np.asarray(function(self.draws, *(o.draws for o in others)), dtype=np.float64))

    def over(self, other: Estimate) -> Estimate:
        """The ratio to another, independent estimate."""
        return self.map(lambda a, b: a / b, other)

    def to_json(self) -> dict[str, float]:
        """`value`, `low`, `high`."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high}


def ratio(repeats: Sequence[tuple[Floats, Floats]], seed: int) -> Estimate:
    """One total over another, over all steps of all repeats (samples over seconds: the throughput), with a two-stage
    bootstrap: repeats, then steps within each.

    A total counts every stall, as whoever waits for the run does; a median step would leave out those of a loader that
    hands over its batches in bursts. (A. Davison, D. Hinkley, Bootstrap Methods and their Application, 1997, sections
    2.4 and 3.8.) With one repeat the interval knows nothing of what differs from run to run.

    Args:
        repeats: (above, below) with one value a step each, for each repeat; none of them empty.
        seed: of the resampling; different cells take different ones, since they are independent.
    """
    rng = np.random.default_rng(seed)
    thinned = [np.stack([_blocks(above), _blocks(below)]) for above, below in repeats]
    lengths = np.array([t.shape[1] for t in thinned])
    padded = np.zeros((2, len(thinned), lengths.max()))
    for row, values in enumerate(thinned):
        padded[:, row, : values.shape[1]] = values
    picked = rng.integers(len(thinned), size=(DRAWS, len(thinned), 1))
    steps = (rng.random((DRAWS, len(thinned), lengths.max())) * lengths[picked]).astype(np.int64)
    # every picked repeat counts with its own number of steps
    above, below = (padded[:, picked, steps].mean(axis=3) * lengths[picked[:, :, 0]]).sum(axis=2)
    total = np.sum([[np.sum(top), np.sum(bottom)] for top, bottom in repeats], axis=0)
    return Estimate(float(total[0] / total[1]), above / below)


def mean_of(values: Sequence[float], seed: int) -> Estimate:
    """The mean over repeats, each one number, with a bootstrap over them."""
    rng = np.random.default_rng(seed)
    array = np.asarray(values, dtype=np.float64)
    return Estimate(float(array.mean()), rng.choice(array, (DRAWS, len(array))).mean(axis=1))


def _blocks(values: Floats) -> Floats:
    """Sums of KEPT blocks of neighbouring steps at most: the total stays."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) <= KEPT:
        return array
    return np.asarray(np.add.reduceat(array, np.arange(KEPT) * len(array) // KEPT), dtype=np.float64)


# ---------------------------------------------------------------------- speed-up


def karp_flatt(speedup: Any, p: float) -> Any:
    """Experimentally determined serial fraction e = (1/S - 1/p) / (1 - 1/p) of a speed-up S on p > 1 devices.

    A. Karp, H. Flatt, Communications of the ACM 33 (1990) 539. It grows with p where overhead does; below 0 the
    speed-up is more than linear.
    """
    return (1 / speedup - 1 / p) / (1 - 1 / p)


@dataclass(frozen=True, slots=True)
class ScalingFit:
    """A scaling law fitted to rates, or why it was refused.

    Attributes:
        law: `Amdahl` or `USL`.
        formula: as fitted, for the report.
        parameters: value and 95 % interval of each; empty where refused.
        refused: the reason, or None.
        points: how many rates, at how many device counts.
        error: root mean square of the relative residuals.
    """

    law: str
    formula: str
    parameters: Mapping[str, tuple[float, float, float]]
    refused: str | None
    points: tuple[int, int]
    error: float | None = None

    def rate(self, n: Any) -> Any:
        """The fitted rate on n devices (not where refused)."""
        first, sigma, *kappa = (value for value, _, _ in self.parameters.values())
        return first * n / (1 + sigma * (n - 1) + (kappa[0] if kappa else 0.0) * n * (n - 1))

    @property
    def peak(self) -> float | None:
        """USL: the device count sqrt((1 - sigma) / kappa) beyond which the rate falls (Gunther 2007), 1 where it falls
        from the first device on; None where kappa's interval reaches 0, since there may be no such count."""
        if self.refused or "kappa" not in self.parameters:
            return None
        kappa, low, _ = self.parameters["kappa"]
        return math.sqrt(max(kappa, 1 - self.parameters["sigma"][0]) / kappa) if low > 0 else None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        named = {k: {"value": v, "low": a, "high": b} for k, (v, a, b) in self.parameters.items()}
        return {
            "law": self.law,
            "formula": self.formula,
            "parameters": named,
            "refused": self.refused,
            "points": self.points[0],
            "counts": self.points[1],
            "relative_error": self.error,
            "peak": self.peak,
        }


AMDAHL = "rate(n) = rate(1) n / (1 + sigma (n - 1))"
USL = "rate(n) = rate(1) n / (1 + sigma (n - 1) + kappa n (n - 1))"
MAX_ERROR = 0.2  # relative; a law that misses the points by more does not describe them


def fit_amdahl(counts: Sequence[float], rates: Sequence[float]) -> ScalingFit:
    """G. Amdahl, AFIPS Spring Joint Computer Conference (1967) 483; sigma is the serial fraction.

    Args:
        counts: devices of each point; repeats are points of their own.
        rates: samples per second of each point.
    """
    return _fit("Amdahl", AMDAHL, lambda n, r, s: r * n / (1 + s * (n - 1)), counts, rates, ("rate1", "sigma"))


def fit_usl(counts: Sequence[float], rates: Sequence[float]) -> ScalingFit:
    """The universal scalability law, N. Gunther, Guerrilla Capacity Planning (2007), chapter 4.

    sigma is contention (waiting for what is shared), kappa coherency (everyone talks to everyone).
    """

    def law(n: Any, r: float, s: float, k: float) -> Any:
        return r * n / (1 + s * (n - 1) + k * n * (n - 1))

    fit = _fit("USL", USL, law, counts, rates, ("rate1", "sigma", "kappa"))
    if fit.refused is None and fit.parameters["kappa"][0] < 0:
        low, high = fit.parameters["kappa"][1:]
        return _refuse(fit, f"kappa would be negative ({low:.2g} to {high:.2g}): the points show no loss that grows")
    return fit


def _fit(
    law: str,
    formula: str,
    function: Callable[..., Any],
    counts: Sequence[float],
    rates: Sequence[float],
    names: tuple[str, ...],
) -> ScalingFit:
    n, y = np.asarray(counts, dtype=np.float64), np.asarray(rates, dtype=np.float64)
    distinct = len(np.unique(n))
    empty = ScalingFit(law, formula, {}, None, (len(n), distinct))
    if distinct <= len(names):
        return _refuse(empty, f"needs at least {len(names) + 1} device counts, measured: {distinct}")
    from scipy.optimize import OptimizeWarning, curve_fit
    from scipy.special import stdtrit

    first = float(np.median(y[n == n.min()]) / n.min())
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", OptimizeWarning)
            # Rates of many devices vary more than those of few: relative errors are taken as equal.
            found, covariance = curve_fit(function, n, y, p0=[first, 0.05, 0.001][: len(names)], sigma=y, maxfev=10_000)
    except (RuntimeError, OptimizeWarning, ValueError) as failure:
        return _refuse(empty, f"the fit does not converge ({' '.join(str(failure).split())})")
    error = float(np.sqrt(np.mean((function(n, *found) / y - 1) ** 2)))
    reach = stdtrit(len(n) - len(names), (1 + LEVEL) / 2) * np.sqrt(np.diag(covariance))
    parameters = {name: (float(v), float(v - w), float(v + w)) for name, v, w in zip(names, found, reach, strict=True)}
    fit = ScalingFit(law, formula, parameters, None, (len(n), distinct), error)
    sigma, low, high = parameters["sigma"]
    if not np.all(np.isfinite(reach)) or (low <= 0 and high >= 1):
        return _refuse(fit, f"the points leave sigma open ({low:.2g} to {high:.2g})")
    if error > MAX_ERROR:
        return _refuse(fit, f"the law misses the points by {100 * error:.0f} % (root mean square)")
    if law == "Amdahl" and sigma > 1:
        return _refuse(fit, "the rate falls with more devices, which Amdahl's law cannot describe")
    if high < 0:
        return _refuse(fit, f"the speed-up is more than linear (sigma {low:.2g} to {high:.2g})")
    return fit


def _refuse(fit: ScalingFit, why: str) -> ScalingFit:
    return ScalingFit(fit.law, fit.formula, {}, why, fit.points, fit.error)
