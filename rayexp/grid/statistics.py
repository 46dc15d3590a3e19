"""Statistics of a device grid, as functions of plain numbers: estimates, their ratios, and scaling laws.

The unit is the run: the steps of one run share its machine, its memory and its hour, so that thousands of them say
little about the next run. Every run therefore gives one number, and an interval comes from what differs between runs.
(A. Georges, D. Buytaert, L. Eeckhout, Statistically Rigorous Java Performance Evaluation, OOPSLA 2007; T. Kalibera, R.
Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
WIDEST = 10.0  # times its lower end; an interval that reaches further tells not even the order of magnitude
TOO_FEW = "too few repeats to say"
Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A positive quantity of which every run shows one value: their geometric mean, and what its interval takes.

    Attributes:
        value: the geometric mean.
        variance: of its logarithm, the square of the standard error; nan with one run.
        freedom: degrees of freedom of `variance`; 0 with one run, infinity for a number that is given.
    """

    value: float
    variance: float = 0.0
    freedom: float = math.inf

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value a run, at least one, each above 0."""
        logs = np.log(np.asarray(values, dtype=np.float64))
        n = len(logs)
        variance = float(logs.var(ddof=1)) / n if n > 1 else math.nan
        return cls(math.exp(logs.mean()), variance, n - 1)

    @property
    def bounds(self) -> Interval | None:
        """Student's t interval at 95 %, on the logarithms, however wide; None with one run, which says nothing of what
        differs between runs."""
        if self.freedom == 0:
            return None
        reach = quantile(self.freedom) * math.sqrt(self.variance) if self.variance else 0.0
        return self.value * _exp(-reach), self.value * _exp(reach)

    @property
    def interval(self) -> Interval | None:
        """The same, where it says something of the value (see `telling`)."""
        bounds = self.bounds
        return bounds if bounds and telling(bounds) else None

    @property
    def open(self) -> bool:
        """Whether several runs were too few to say anything: `TOO_FEW` then stands where the interval would."""
        return self.bounds is not None and self.interval is None

    def over(self, other: Estimate) -> Estimate:
        """The ratio to another, independent estimate: Welch's interval for the difference of the logarithms, with
        Satterthwaite's degrees of freedom (B. L. Welch, Biometrika 34 (1947) 28). The spreads may differ."""
        value = self.value / other.value
        if not (self.freedom and other.freedom):
            return Estimate(value, math.nan, 0)
        variance = self.variance + other.variance
        share = self.variance**2 / self.freedom + other.variance**2 / other.freedom
        return Estimate(value, variance, variance**2 / share if share else math.inf)

    def times(self, factor: float) -> Estimate:
        """The same quantity in another unit."""
        return Estimate(self.value * factor, self.variance, self.freedom)

    def to_json(self) -> dict[str, float | None]:
        """`value`, `low`, `high`; the latter two are null where there is no interval."""
        low, high = self.interval or (None, None)
        return {"value": self.value, "low": low, "high": high}


def telling(bounds: Interval) -> bool:
    """Whether an interval says anything of a positive quantity: its ends differ by no more than a factor WIDEST. It is
    the one rule for rates, ratios and forecasts.

    It is so generous because what is left out holds the truth nearly always: with a narrower one the intervals that are
    left would hold it less often than 95 % (the tests simulate both)."""
    low, high = bounds
    return low > 0 and high <= WIDEST * low


def quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t: how many standard errors a two-sided 95 % interval reaches."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def _exp(power: float) -> float:
    return math.exp(min(power, 700.0))  # two runs far apart reach further than a float64


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
    reach = quantile(len(n) - len(names)) * np.sqrt(np.diag(covariance))
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
