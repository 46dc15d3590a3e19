"""Cells that belong together: those that must end with the same weights, and those that one scaling law describes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayexp.config import CompareConfig
from rayexp.display import counted, short
from rayexp.grid.comparison import PLAIN
from rayexp.grid.forecast import Forecast, Link, StepModel, StepTimes, forecast, measure_link
from rayexp.grid.measured import Measured
from rayexp.grid.statistics import AMDAHL, TOO_FEW, USL, Estimate, ScalingFit, fit_amdahl, fit_usl

FORECAST_COUNTS = (2, 4, 8, 16, 32)
MAX_MISS = 0.5  # relative; a model that is further off at a count that was measured says nothing of others
REPEAT = "one repeat says nothing of what differs between runs; take several (repeats=3)"


@dataclass(frozen=True, slots=True)
class CellGroup:
    """Exact cells that must give the same weights: one kind of device, one precision, one batch and its shards.

    Attributes:
        name: `cpu fp32`.
        cells: their ids.
        runs: how many of them are done, all repeats counted.
        shas: the distinct hashes of their last weights, sorted.
    """

    name: str
    cells: tuple[str, ...]
    runs: int
    shas: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether all runs ended with the same weights."""
        return len(self.shas) == 1

    def sentence(self) -> str:
        """For people."""
        where = f"{counted(self.runs, 'exact run')} of {counted(len(self.cells), 'cell')}"
        if self.runs == 1:
            return f"{self.name}: one exact run ({short(self.shas[0])}), and none to compare it with"
        if self.equal:
            return f"{self.name}: {where} ended with the same weights ({short(self.shas[0])})"
        return f"{self.name}: {where} ended with {len(self.shas)} DIFFERENT weights"


@dataclass(frozen=True, slots=True)
class FamilyKey:
    """What the cells of a family share: kind of device, precision, reduction, the grid's batch size, and the mode,
    strong or weak."""

    kind: str
    precision: str
    reduction: str
    batch: int
    mode: str

    def name(self, several_batches: bool, several_modes: bool) -> str:
        """`cpu, fp32, exact`, and what else tells it from the other families."""
        parts = [self.kind, self.precision, self.reduction]
        parts += [f"batch {self.batch}"] if several_batches else []
        parts += [self.mode] if several_modes else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Family:
    """The cells of one kind, precision, reduction, batch and mode: fits and forecasts.

    Attributes:
        key: what they share.
        name: `cpu, fp32, exact`.
        base: id of the cell that the forecasts start from.
        fits: scaling laws of samples per second over devices; none under weak scaling.
        link: what connects the workers; None where it was neither measured nor given.
        forecasts: at worker counts that were not measured.
        left_out: the largest measured count, where the model could be checked by leaving it out.
        miss: relative error of the model without that count at it; above 0: it promised too much.
        unsaid: worker counts at which the repeats are too few for a forecast that says anything.
        why_not: why there are no forecasts, or None.
    """

    key: FamilyKey
    name: str
    base: str
    fits: tuple[ScalingFit, ...]
    link: Link | None
    forecasts: tuple[Forecast, ...] = ()
    left_out: int | None = None
    miss: float | None = None
    unsaid: tuple[int, ...] = ()
    why_not: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What `--json` says of the forecasts."""
        return {
            "from": self.base,
            "interconnect": self.link and self.link.to_json(),
            "left_out_workers": self.left_out,
            "error_at_left_out": self.miss,
            "too_few_repeats_for": list(self.unsaid),
            "refused": self.why_not,
            "rates": [one.to_json() for one in self.forecasts],
        }


def keys_of(m: Measured) -> list[FamilyKey]:
    """The families that a cell belongs to: one for each mode, none for a plain script."""
    return [FamilyKey(m.cell.kind, m.cell.precision, m.cell.reduction, m.cell.batch, mode) for mode in m.cell.modes]


def by_family(measured: Sequence[Measured]) -> dict[FamilyKey, list[Measured]]:
    """The cells of each family, in the order of the plan.

    With weak scaling the work grows with the devices. A cell in this process has one worker's batch, so it is a point
    of that only where it has no more devices than a worker.
    """
    found: dict[FamilyKey, list[Measured]] = {}
    for m in measured:
        for key in keys_of(m):
            found.setdefault(key, []).append(m)
    for key, members in found.items():
        worker = max((m.cell.devices / m.cell.workers for m in members if m.cell.workers), default=math.inf)
        if key.mode == "weak":
            found[key] = [m for m in members if m.cell.workers or m.cell.devices <= worker]
    return found


def batch_of(m: Measured) -> tuple[int, int]:
    """Batch size and shards of a cell: with others it is another model."""
    return m.cell.config["batch_size"], m.cell.config["shards"]


def equal_groups(measured: Sequence[Measured]) -> tuple[CellGroup, ...]:
    """The exact cells, grouped by what must give equal weights."""
    found: dict[tuple[str, str, tuple[int, int]], list[Measured]] = {}
    for m in measured:
        if m.cell.reduction == "exact":
            found.setdefault((m.cell.kind, m.cell.precision, batch_of(m)), []).append(m)
    several = len({key[:2] for key in found}) < len(found)  # every size of a batch is an experiment of its own
    return tuple(
        CellGroup(
            f"{kind} {precision}" + (f", batch {batch} in {counted(shards, 'shard')}" if several else ""),
            tuple(m.cell.id for m in members),
            sum(len(m.repeats) for m in members),
            tuple(sorted({sha for m in members for sha in m.shas()})),
        )
        for (kind, precision, (batch, shards)), members in found.items()
    )


def families(measured: Sequence[Measured], config: CompareConfig) -> list[Family]:
    """Every family but the plain scripts', with its fits and forecasts."""
    grouped = by_family([m for m in measured if m.cell.reduction != PLAIN])
    several = len({key.batch for key in grouped}) > 1, len({key.mode for key in grouped}) > 1
    found = []
    for key, members in grouped.items():
        # In-process cells exchange nothing and may use other cores: the law is that of the workers, where there are.
        ours = sorted([m for m in members if m.cell.workers] or members, key=lambda m: m.cell.devices)
        found.append(_forecast(key, key.name(*several), ours, _fits(ours) if key.mode == "strong" else (), config))
    return found


def _fits(ours: Sequence[Measured]) -> tuple[ScalingFit, ...]:
    points = [(m.cell.devices, repeat.throughput) for m in ours for repeat in m.repeats]
    counts, values = [n for n, _ in points], [rate for _, rate in points]
    if min(len(m.repeats) for m in ours) < 2:
        size = len(points), len(set(counts))
        return tuple(ScalingFit(law, formula, {}, REPEAT, size) for law, formula in (("Amdahl", AMDAHL), ("USL", USL)))
    return fit_amdahl(counts, values), fit_usl(counts, values)


def _forecast(
    key: FamilyKey, name: str, ours: list[Measured], fits: tuple[ScalingFit, ...], config: CompareConfig
) -> Family:
    # What lies nearest to the counts that were not measured.
    base = max(ours, key=lambda m: m.cell.workers)
    rounds = range(min(len(m.repeats) for m in ours))
    links = [_link(ours, i, config) for i in rounds]
    link = _mean_link(links)
    family = Family(key, name, base.cell.id, fits, link)
    if link is None or not base.meta.get("exchange_bytes"):
        why = "no cell of 2 or more workers was measured, and interconnect.bandwidth_gbit is not given"
        return replace(family, why_not=why)
    if len(rounds) < 2:
        return replace(family, why_not=REPEAT)
    models = _models(ours, links, key.mode)
    workers = max(1, base.cell.workers)
    rest = [m for m in ours if m.cell.workers < base.cell.workers]
    miss = None
    if rest:
        # The link is known from bare exchanges, not from steps, so the steps alone are left out.
        promised = Estimate.of([model.rate(workers) for model in _models(rest, links, key.mode)])
        miss = promised.value / base.rate().value - 1
        family = replace(family, left_out=workers, miss=miss)
        if abs(miss) > MAX_MISS:
            why = f"made without {counted(workers, 'worker')}, the model is off by {100 * miss:+.0f} % there"
            return replace(family, why_not=why)
    counts = [n for n in FORECAST_COUNTS if n not in {max(1, m.cell.workers) for m in ours}]
    shards = int(base.cell.config["shards"])
    per_worker = base.cell.devices / workers
    found = forecast(models, per_worker, counts, miss and abs(miss), shards)
    if not found:
        return replace(family, why_not=TOO_FEW)
    said = {one.workers for one in found}
    return replace(family, forecasts=tuple(found), unsaid=tuple(n for n in counts if n not in said))


def _models(members: Sequence[Measured], links: Sequence[Link | None], mode: str) -> list[StepModel]:
    """A model for every round of repeats."""
    return [
        StepModel.of([_step(m, i) for m in members], link, mode == "weak")
        for i, link in enumerate(links)
        if link is not None
    ]


def _step(m: Measured, repeat: int) -> StepTimes:
    one = m.repeats[repeat]
    return StepTimes(
        workers=max(1, m.cell.workers),
        work=one.step_seconds("data", "transfer", "compute"),
        optimizer=one.step_seconds("optimizer"),
        reduce=one.step_seconds("reduce"),
        volume=float(one.run.meta().get("exchange_bytes") or 0),
        samples=float(one.steps["count"].mean()),
    )


def _link(ours: Sequence[Measured], repeat: int, config: CompareConfig) -> Link | None:
    """The link as one round of repeats shows it."""
    gbit, microseconds = config.interconnect.get("bandwidth_gbit"), config.interconnect.get("latency_us")
    points = [point for m in ours if m.cell.workers > 1 for point in m.repeats[repeat].link_points(m.cell.workers)]
    bandwidth = None if gbit is None else gbit * 1e9 / 8
    return measure_link(points, bandwidth, None if microseconds is None else microseconds * 1e-6)


def _mean_link(links: Sequence[Link | None]) -> Link | None:
    known = [link for link in links if link is not None]
    if not known or len(known) < len(links):
        return None
    bandwidth = float(np.exp(np.mean(np.log([link.bandwidth for link in known]))))
    return Link(bandwidth, float(np.mean([link.latency for link in known])), known[0].source)
