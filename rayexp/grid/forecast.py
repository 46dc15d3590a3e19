"""Rates at worker counts that were not measured: from measured compute, the bytes exchanged, and the workers' link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayexp.grid.statistics import Estimate, Floats


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
    J. Parallel Distrib. Comput. 69 (2009) 117. It holds for ring all-reduce and for the exact exchange alike.
    """
    return 2 * (workers - 1) / workers * volume / bandwidth + 2 * (workers - 1) * latency


Point = tuple[int, float, Estimate]
"""Workers, bytes, and seconds of adding up that many bytes over them."""


def measure_link(points: Sequence[Point], bandwidth: float | None, latency: float | None) -> Link | None:
    """The link, as given or as measured all-reductions show it; None where neither is there.

    Args:
        points: measured all-reductions, of large and of small messages.
        bandwidth: bytes per second, if given.
        latency: seconds, if given.
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
    if latency is None and (bandwidth is not None or len({(w, volume) for w, volume, _ in points}) > 1):
        columns.append(per_message)
    matrix = np.stack(columns, 1)

    def solve(seconds: Floats) -> tuple[float, float]:
        known = (0.0 if bandwidth is None else per_byte / bandwidth) + (latency or 0.0) * per_message
        # Relative errors: small messages tell of the latency, large ones of the bandwidth.
        weight = 1 / np.maximum(seconds, 1e-9)
        x = list(nnls(matrix * weight[:, None], np.maximum(seconds - known, 0.0) * weight)[0])
        inverse = x.pop(0) if bandwidth is None else 1 / bandwidth
        return 1 / max(inverse, 1e-15), latency if latency is not None else (x[0] if x else 0.0)

    value = solve(np.array([s.value for _, _, s in points]))
    draws = np.array([solve(column) for column in np.stack([s.draws for _, _, s in points], 1)])
    counts = ", ".join(str(w) for w in sorted({w for w, _, _ in points}))
    source = f"measured between {counts} workers"
    if bandwidth is not None or latency is not None:
        source = f"{'bandwidth' if bandwidth is not None else 'latency'} given, the rest {source}"
    return Link(Estimate(value[0], draws[:, 0]), Estimate(value[1], draws[:, 1]), source)


@dataclass(frozen=True, slots=True)
class StepModel:
    """Where a measured step's time goes, and how each part changes with the number of workers.

    Attributes:
        workers: of the measured cell (in-process counts as 1).
        parallel: seconds that are shared among the workers: data, transfer, forward and backward.
        fixed: seconds that every worker spends in full: the optimizer.
        reduce: seconds that the measured step waited for the reduction. What the bare exchange takes beyond that hid
            behind the backward pass; the share that can hide shrinks as that pass does. What is waited for beyond the
            bare exchange (adding, slower workers) stays.
        volume: bytes that are reduced in a step.
        samples: of a step.
        link: between the workers.
        weak: the work of a worker stays the same, so the samples grow.
    """

    workers: int
    parallel: Estimate
    fixed: Estimate
    reduce: Estimate
    volume: float
    samples: float
    link: Link
    weak: bool = False

    def exchange(self, workers: int) -> Estimate:
        """Seconds of a step on that many workers that are spent waiting for the reduction."""
        share = self._share(workers)

        def waited(reduce: Any, bandwidth: Any, latency: Any) -> Any:
            surplus = exchange_seconds(self.workers, self.volume, bandwidth, latency) - reduce
            hidden, beyond = np.maximum(surplus, 0.0), np.maximum(-surplus, 0.0)
            bare = exchange_seconds(workers, self.volume, bandwidth, latency)
            return np.maximum(bare - hidden * share, 0.0) + beyond

        return self.reduce.map(waited, self.link.bandwidth, self.link.latency)

    def seconds(self, workers: int) -> Estimate:
        """Of a step on that many workers."""
        share = self._share(workers)
        return self.parallel.map(lambda p, f, e: p * share + f + e, self.fixed, self.exchange(workers))

    def rate(self, workers: int) -> Estimate:
        """Samples per second."""
        samples = self.samples * (workers / self.workers if self.weak else 1.0)
        return self.seconds(workers).map(lambda s: samples / s)

    def _share(self, workers: int) -> float:
        """A worker's work there, as a share of what it is in the measured cell."""
        return 1.0 if self.weak else self.workers / workers


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
                share_reduce=model.exchange(workers).value / model.seconds(workers).value,
                note="; ".join(notes),
            )
        )
    return found, worst
