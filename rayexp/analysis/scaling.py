"""Statistics of a device grid, as functions of plain numbers: estimates, ratios, scaling laws, and a forecast.

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
KEPT = 512  # steps of a repeat that are resampled; longer repeats are thinned to as many quantiles
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


def median(repeats: Sequence[Floats], seed: int) -> Estimate:
    """The median over all steps of all repeats, with a two-stage bootstrap: repeats, then steps within each.

    (A. Davison, D. Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.) With one repeat the interval
    knows nothing of what differs from run to run.

    Args:
        repeats: one value a step, for each repeat; none of them empty.
        seed: of the resampling; different cells take different ones, since they are independent.
    """
    rng = np.random.default_rng(seed)
    thinned = [_thin(np.asarray(r, dtype=np.float64)) for r in repeats]
    lengths = np.array([len(t) for t in thinned])
    padded = np.zeros((len(thinned), lengths.max()))
    for row, values in zip(padded, thinned, strict=True):
        row[: len(values)] = values
    picked = rng.integers(len(thinned), size=(DRAWS, len(thinned), 1))
    steps = (rng.random((DRAWS, len(thinned), lengths.max())) * lengths[picked]).astype(np.int64)
    draws = np.median(padded[picked, steps].reshape(DRAWS, -1), axis=1)
    return Estimate(float(np.median(np.concatenate(list(repeats)))), draws)


def mean_of(values: Sequence[float], seed: int) -> Estimate:
    """The mean over repeats, each one number, with a bootstrap over them."""
    rng = np.random.default_rng(seed)
    array = np.asarray(values, dtype=np.float64)
    return Estimate(float(array.mean()), rng.choice(array, (DRAWS, len(array))).mean(axis=1))


def _thin(values: Floats) -> Floats:
    if len(values) <= KEPT:
        return values
    return np.asarray(np.quantile(values, (np.arange(KEPT) + 0.5) / KEPT), dtype=np.float64)


# ---------------------------------------------------------------------- speed-up


def karp_flatt(speedup: Any, p: float) -> Any:
    """Experimentally determined serial fraction e = (1/S - 1/p) / (1 - 1/p) of a speed-up S on p > 1 devices.

    A. Karp, H. Flatt, Communications of the ACM 33 (1990) 539. It grows with p where overhead does; below 0 the
    speed-up is more than linear.
    """
    return (1 / speedup - 1 / p) / (1 - 1 / p)


@dataclass(frozen=True, slots=True)
class Fit:
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
        """USL: the device count sqrt((1 - sigma) / kappa) beyond which the rate falls (Gunther 2007); None where
        kappa's interval reaches 0, since there may be no such count."""
        if self.refused or "kappa" not in self.parameters:
            return None
        kappa, low, _ = self.parameters["kappa"]
        return math.sqrt(max(0.0, 1 - self.parameters["sigma"][0]) / kappa) if low > 0 else None

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


def fit_amdahl(counts: Sequence[float], rates: Sequence[float]) -> Fit:
    """G. Amdahl, AFIPS Spring Joint Computer Conference (1967) 483; sigma is the serial fraction.

    Args:
        counts: devices of each point; repeats are points of their own.
        rates: samples per second of each point.
    """
    return _fit("Amdahl", AMDAHL, lambda n, r, s: r * n / (1 + s * (n - 1)), counts, rates, ("rate1", "sigma"))


def fit_usl(counts: Sequence[float], rates: Sequence[float]) -> Fit:
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
) -> Fit:
    n, y = np.asarray(counts, dtype=np.float64), np.asarray(rates, dtype=np.float64)
    distinct = len(np.unique(n))
    empty = Fit(law, formula, {}, None, (len(n), distinct))
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
    fit = Fit(law, formula, parameters, None, (len(n), distinct), error)
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


def _refuse(fit: Fit, why: str) -> Fit:
    return Fit(fit.law, fit.formula, {}, why, fit.points, fit.error)


# ---------------------------------------------------------------------- forecast


@dataclass(frozen=True, slots=True)
class Link:
    """What connects the workers: bytes per second, seconds per message, and where the numbers come from."""

    bandwidth: Estimate
    latency: Estimate
    source: str

    def to_json(self) -> dict[str, Any]:
        """In Gbit/s and microseconds, as in the configuration."""
        return {
            "bandwidth_gbit": self.bandwidth.map(lambda b: b * 8e-9).to_json(),
            "latency_us": self.latency.map(lambda s: s * 1e6).to_json(),
            "source": self.source,
        }


def exchange_seconds(workers: Any, volume: float, bandwidth: Any, latency: Any) -> Any:
    """Time of adding up `volume` bytes over n workers: 2 (n-1)/n volume / bandwidth + 2 (n-1) latency.

    Reduce-scatter and all-gather in n - 1 messages each, at the bandwidth-optimal volume: P. Patarasuk, X. Yuan,
    J. Parallel Distrib. Comput. 69 (2009) 117. It holds for ring all-reduce and for the exact exchange alike. Nothing
    of it hides behind the backward pass here: a measured bandwidth is what remained to be waited for, and with a given
    one the forecast is cautious.
    """
    return 2 * (workers - 1) / workers * volume / bandwidth + 2 * (workers - 1) * latency


def measure_link(
    points: Sequence[tuple[int, float, Estimate]], bandwidth: float | None, latency: float | None
) -> Link | None:
    """The link, as given, or as the reductions of measured cells show it; None where neither is there.

    Args:
        points: workers, bytes and seconds of the reduction of a step, for each measured cell of 2 or more workers.
            Seconds include the additions and waiting for the slowest worker, so the bandwidth is an effective one.
        bandwidth: bytes per second, if given.
        latency: seconds, if given. With one measured worker count a latency that is not given is taken as 0.
    """
    if bandwidth is not None and (latency is not None or not points):
        return Link(Estimate.exact(bandwidth), Estimate.exact(latency or 0.0), "given")
    if not points:
        return None
    from scipy.optimize import nnls

    per_byte = np.array([2 * (w - 1) / w * volume for w, volume, _ in points])
    per_message = np.array([2.0 * (w - 1) for w, _, _ in points])
    columns = []  # what is unknown: seconds per byte, seconds per message
    if bandwidth is None:
        columns.append(per_byte)
    if latency is None and (bandwidth is not None or len({w for w, _, _ in points}) > 1):
        columns.append(per_message)
    matrix = np.stack(columns, 1)

    def solve(seconds: Floats) -> tuple[float, float]:
        known = (0.0 if bandwidth is None else per_byte / bandwidth) + (latency or 0.0) * per_message
        x = list(nnls(matrix, np.maximum(seconds - known, 0.0))[0])
        inverse = x.pop(0) if bandwidth is None else 1 / bandwidth
        return 1 / max(inverse, 1e-15), latency if latency is not None else (x[0] if x else 0.0)

    value = solve(np.array([s.value for _, _, s in points]))
    draws = np.array([solve(column) for column in np.stack([s.draws for _, _, s in points], 1)])
    counts = ", ".join(str(w) for w in sorted({w for w, _, _ in points}))
    source = f"measured: the reductions of {counts} workers"
    if bandwidth is not None or latency is not None:
        source = f"{'bandwidth' if bandwidth is not None else 'latency'} given, the rest {source}"
    return Link(Estimate(value[0], draws[:, 0]), Estimate(value[1], draws[:, 1]), source)


@dataclass(frozen=True, slots=True)
class StepModel:
    """Where a measured step's time goes, and how each part changes with the number of workers.

    Attributes:
        workers: of the measured cell (in-process counts as 1).
        parallel: seconds that are shared among the workers: data, transfer, forward and backward.
        fixed: seconds that every worker spends in full: optimizer, bookkeeping.
        volume: bytes that are reduced in a step.
        samples: of a step.
        link: between the workers.
        weak: the work of a worker stays the same, so the samples grow.
    """

    workers: int
    parallel: Estimate
    fixed: Estimate
    volume: float
    samples: float
    link: Link
    weak: bool = False

    def seconds(self, workers: int) -> Estimate:
        """Of a step on that many workers."""
        share = 1.0 if self.weak else self.workers / workers

        def total(parallel: Any, fixed: Any, bandwidth: Any, latency: Any) -> Any:
            return parallel * share + fixed + exchange_seconds(workers, self.volume, bandwidth, latency)

        return self.parallel.map(total, self.fixed, self.link.bandwidth, self.link.latency)

    def rate(self, workers: int) -> Estimate:
        """Samples per second."""
        samples = self.samples * (workers / self.workers if self.weak else 1.0)
        return self.seconds(workers).map(lambda s: samples / s)


@dataclass(frozen=True, slots=True)
class Forecast:
    """A rate that was NOT measured. `low` and `high` hold the bootstrap interval, widened by the model's worst miss."""

    workers: int
    devices: float
    rate: float
    low: float
    high: float
    share_reduce: float
    note: str

    def to_json(self) -> dict[str, Any]:
        """`measured: false` says what it is."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"measured": False, **named}


def forecast(
    model: StepModel, devices_per_worker: float, counts: Sequence[int], checks: Mapping[int, float], shards: int
) -> tuple[list[Forecast], float | None]:
    """Rates at worker counts that were not measured, and the worst relative miss where the model could be checked.

    Args:
        model: from a measured cell.
        devices_per_worker: cores or GPUs.
        counts: worker counts to forecast.
        checks: measured rate by worker count, of cells that the model was not made from.
        shards: of a batch; more workers than shards need more shards.
    """
    misses = [abs(model.rate(w).value / rate - 1) for w, rate in checks.items()]
    worst = max(misses, default=None)
    found = []
    for workers in counts:
        rate = model.rate(workers)
        low, high = rate.interval
        exchange = exchange_seconds(workers, model.volume, model.link.bandwidth.value, model.link.latency.value)
        notes = [] if checks else ["not checked at any measured count"]
        if not model.weak and shards % workers:
            notes.append(f"needs shards divisible by {workers}, the runs had {shards}")
        margin = worst or 0.0
        found.append(
            Forecast(
                workers=workers,
                devices=workers * devices_per_worker,
                rate=rate.value,
                low=low * (1 - min(margin, 1.0)),
                high=high * (1 + margin),
                share_reduce=float(exchange / model.seconds(workers).value),
                note="; ".join(notes),
            )
        )
    return found, worst
