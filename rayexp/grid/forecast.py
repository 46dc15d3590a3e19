"""Rates at worker counts that were not measured: from measured steps, the bytes exchanged, and the workers' link.

A step on n workers takes parallel / n + floor + exchange(n): work that the workers share, time that no number of them
removes, and the wait for the sum of the gradients. Every round of repeats gives a model of its own, so that what
differs between runs is in the interval of a forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayexp.grid.statistics import Estimate, telling


@dataclass(frozen=True, slots=True)
class Link:
    """What connects the workers: bytes per second, seconds per message, and where the numbers come from."""

    bandwidth: float
    latency: float
    source: str

    def to_json(self) -> dict[str, Any]:
        """In Gbit/s and microseconds, as in the configuration."""
        return {
            "bandwidth_gbit": {"value": self.bandwidth * 8e-9},
            "latency_us": {"value": self.latency * 1e6},
            "source": self.source,
        }


def ring_bytes(workers: float, volume: float) -> float:
    """What each of n workers sends to add up `volume` bytes over all of them: 2 (n-1)/n volume, the least possible.

    P. Patarasuk, X. Yuan, J. Parallel Distrib. Comput. 69 (2009) 117.
    """
    return 2 * (workers - 1) / workers * volume


def exchange_seconds(workers: float, volume: float, bandwidth: float, latency: float) -> float:
    """Time of adding up `volume` bytes over n workers: 2 (n-1)/n volume / bandwidth + 2 (n-1) latency.

    Reduce-scatter and all-gather in n - 1 messages each, at the bandwidth-optimal volume (see `ring_bytes`). It holds
    for ring all-reduce and for the exact exchange alike.
    """
    return ring_bytes(workers, volume) / bandwidth + 2 * (workers - 1) * latency


Point = tuple[int, float, float]
"""Workers, bytes, and seconds of adding up that many bytes over them."""


def measure_link(points: Sequence[Point], bandwidth: float | None, latency: float | None) -> Link | None:
    """The link, as given or as measured all-reductions show it; None where neither is there.

    Args:
        points: measured all-reductions, of large and of small messages.
        bandwidth: bytes per second, if given.
        latency: seconds, if given.
    """
    if bandwidth is not None and (latency is not None or not points):
        return Link(bandwidth, latency or 0.0, "given")
    if not points:
        return None
    from scipy.optimize import nnls

    per_byte = np.array([ring_bytes(w, volume) for w, volume, _ in points])
    per_message = np.array([2.0 * (w - 1) for w, _, _ in points])
    columns = []  # what is unknown: seconds per byte, seconds per message
    if bandwidth is None:
        columns.append(per_byte)
    if latency is None and (bandwidth is not None or len({(w, volume) for w, volume, _ in points}) > 1):
        columns.append(per_message)
    seconds = np.array([s for _, _, s in points])
    known = (0.0 if bandwidth is None else per_byte / bandwidth) + (latency or 0.0) * per_message
    # Relative errors: small messages tell of the latency, large ones of the bandwidth.
    weight = 1 / np.maximum(seconds, 1e-9)
    x = list(nnls(np.stack(columns, 1) * weight[:, None], np.maximum(seconds - known, 0.0) * weight)[0])
    inverse = x.pop(0) if bandwidth is None else 1 / bandwidth
    counts = ", ".join(str(w) for w in sorted({w for w, _, _ in points}))
    source = f"measured between {counts} workers"
    if bandwidth is not None or latency is not None:
        source = f"{'bandwidth' if bandwidth is not None else 'latency'} given, the rest {source}"
    return Link(1 / max(inverse, 1e-15), latency if latency is not None else float(x[0] if x else 0.0), source)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """An ordinary step of one run, in seconds.

    Attributes:
        workers: of the run (in-process counts as 1).
        work: data, transfer, forward and backward.
        optimizer: the update, which every worker computes in full.
        reduce: waiting for the reduction.
        volume: bytes that are reduced.
        samples: of the step, over all workers.
    """

    workers: int
    work: float
    optimizer: float
    reduce: float
    volume: float
    samples: float


@dataclass(frozen=True, slots=True)
class StepModel:
    """Where a step's time goes, and how each part changes with the number of workers.

    Attributes:
        workers: of the measured run with the most of them.
        parallel: seconds there that are shared among the workers: data, transfer, forward and backward.
        floor: seconds that no number of workers removes: the optimizer, and what did not shrink at measured counts.
        reduce: seconds that the measured step waited for the reduction. What the bare exchange takes beyond that hid
            behind the backward pass; the share that can hide shrinks as that pass does. What is waited for beyond the
            bare exchange (adding, slower workers) stays.
        volume: bytes that are reduced in a step.
        samples: of a step.
        link: between the workers.
        weak: the work of a worker stays the same, so the samples grow.
    """

    workers: int
    parallel: float
    floor: float
    reduce: float
    volume: float
    samples: float
    link: Link
    weak: bool = False

    @classmethod
    def of(cls, steps: Sequence[StepTimes], link: Link, weak: bool = False) -> StepModel:
        """From the runs of one round, at one worker count or several; of several, the work is split into what shrinks
        with their number and what does not, by least squares of the relative errors."""
        base = max(steps, key=lambda step: step.workers)
        parallel, rest = base.work, 0.0
        if not weak and len({step.workers for step in steps}) > 1:
            from scipy.optimize import nnls

            shares = np.array([[1 / step.workers, 1.0] for step in steps])
            weight = 1 / np.array([step.work for step in steps])
            (whole, rest), _ = nnls(shares * weight[:, None], np.ones(len(steps)))
            parallel = float(whole) / base.workers
        optimizer = float(np.mean([step.optimizer for step in steps]))
        return cls(
            base.workers, parallel, float(rest) + optimizer, base.reduce, base.volume, base.samples, link, weak
        )  # fmt: skip

    def exchange(self, workers: int) -> float:
        """Seconds of a step on that many workers that are spent waiting for the reduction."""
        there = exchange_seconds(self.workers, self.volume, self.link.bandwidth, self.link.latency)
        bare = exchange_seconds(workers, self.volume, self.link.bandwidth, self.link.latency)
        hidden, beyond = max(there - self.reduce, 0.0), max(self.reduce - there, 0.0)
        return max(bare - hidden * self._share(workers), 0.0) + beyond

    def work(self, workers: int) -> float:
        """Seconds of a step that are shared among that many workers."""
        return self.parallel * self._share(workers)

    def seconds(self, workers: int) -> float:
        """Of a step on that many workers."""
        return self.work(workers) + self.floor + self.exchange(workers)

    def rate(self, workers: int) -> float:
        """Samples per second."""
        return self.samples * (workers / self.workers if self.weak else 1.0) / self.seconds(workers)

    def _share(self, workers: int) -> float:
        """A worker's work there, as a share of what it is in the measured run."""
        return 1.0 if self.weak else self.workers / workers


@dataclass(frozen=True, slots=True)
class Forecast:
    """A rate that was NOT measured, and the seconds of a step there. `low` and `high`: the t interval over the rounds,
    widened by the error at the count that was left out."""

    workers: int
    devices: float
    rate: float
    low: float
    high: float
    work_seconds: float
    floor_seconds: float
    exchange_seconds: float
    note: str

    @property
    def share_reduce(self) -> float:
        """Share of a step that is spent in the exchange."""
        return self.exchange_seconds / (self.work_seconds + self.floor_seconds + self.exchange_seconds)

    def to_json(self) -> dict[str, Any]:
        """`measured: false` says what it is."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"measured": False, **named, "share_reduce": self.share_reduce}


def forecast(
    models: Sequence[StepModel], devices_per_worker: float, counts: Sequence[int], miss: float | None, shards: int
) -> list[Forecast]:
    """Rates at worker counts that were not measured; without those whose interval says nothing (`telling`).

    Args:
        models: one a round, at least two.
        devices_per_worker: cores or GPUs.
        counts: worker counts to forecast.
        miss: relative error of such models at a measured count that they were not made from; None: there is none.
        shards: of a batch; more workers than shards need more shards.
    """
    found = []
    for workers in counts:
        rate = Estimate.of([model.rate(workers) for model in models])
        low, high = rate.bounds or (0.0, 0.0)
        low, high = low * (1 - min(miss or 0.0, 1.0)), high * (1 + (miss or 0.0))
        if not telling((low, high)):
            continue
        notes = ["not checked at any measured count"] if miss is None else []
        if not models[0].weak and shards % workers:
            notes.append(f"needs shards divisible by {workers}, the runs had {shards}")
        found.append(
            Forecast(
                workers=workers,
                devices=workers * devices_per_worker,
                rate=rate.value,
                low=low,
                high=high,
                work_seconds=float(np.mean([model.work(workers) for model in models])),
                floor_seconds=float(np.mean([model.floor for model in models])),
                exchange_seconds=float(np.mean([model.exchange(workers) for model in models])),
                note="; ".join(notes),
            )
        )
    return found
