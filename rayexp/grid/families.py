"""Cells that belong together: those that must end with the same weights, and those that one scaling law describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayexp.config import CompareConfig
from rayexp.display import counted, short
from rayexp.grid.comparison import PLAIN
from rayexp.grid.forecast import Forecast, Link, StepModel, forecast, measure_link
from rayexp.grid.measured import Measured
from rayexp.grid.statistics import Estimate, ScalingFit, fit_amdahl, fit_usl

FORECAST_COUNTS = (2, 4, 8, 16, 32)
MAX_MISS = 0.5  # relative; a model that is further off at counts that were measured says nothing of others


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
class Family:
    """The cells of one kind, precision and reduction: fits and forecasts.

    Attributes:
        name: `cpu, fp32, exact`.
        base: id of the cell that the forecasts start from.
        fits: scaling laws of samples per second over devices; none under weak scaling.
        link: what connects the workers; None where it was neither measured nor given.
        forecasts: at worker counts that were not measured.
        worst_miss: relative, of the model at the counts that were measured; None where there is none to check.
        why_not: why there are no forecasts, or None.
    """

    name: str
    base: str
    fits: tuple[ScalingFit, ...]
    link: Link | None
    forecasts: tuple[Forecast, ...]
    worst_miss: float | None
    why_not: str | None


def family_of(m: Measured) -> tuple[str, str, str]:
    """Kind, precision and reduction of a cell: what its family shares."""
    return m.cell.kind, m.cell.precision, m.cell.reduction


def equal_groups(measured: list[Measured]) -> tuple[CellGroup, ...]:
    """The exact cells, grouped by what must give equal weights."""
    found: dict[tuple[Any, ...], list[Measured]] = {}
    for m in measured:
        if m.cell.reduction == "exact":
            key = (m.cell.kind, m.cell.precision, m.cell.config["batch_size"], m.cell.config["shards"])
            found.setdefault(key, []).append(m)
    several = len({key[:2] for key in found}) < len(found)  # weak scaling: every size is an experiment of its own
    return tuple(
        CellGroup(
            f"{key[0]} {key[1]}" + (f", batch {key[2]}" if several else ""),
            tuple(m.cell.id for m in members),
            sum(len(m.repeats) for m in members),
            tuple(sorted({sha for m in members for sha in m.shas()})),
        )
        for key, members in found.items()
    )


def families(measured: list[Measured], rates: Mapping[str, Estimate], config: CompareConfig) -> list[Family]:
    """Every family but the plain scripts', with its fits and forecasts."""
    found: dict[tuple[str, str, str], list[Measured]] = {}
    for m in measured:
        if m.cell.reduction != PLAIN:
            found.setdefault(family_of(m), []).append(m)
    fitted = []
    for (kind, precision, reduction), members in found.items():
        # In-process cells exchange nothing and may use other cores: the law is that of the workers, where there are.
        ours = [m for m in members if m.cell.workers] or members
        ours.sort(key=lambda m: m.cell.devices)
        points = [(m.cell.devices, r) for m in ours for r in _throughputs(m)]
        fits: tuple[ScalingFit, ...] = ()
        if config.mode == "strong":
            counts, values = [n for n, _ in points], [r for _, r in points]
            fits = (fit_amdahl(counts, values), fit_usl(counts, values))
        fitted.append(_forecast(f"{kind}, {precision}, {reduction}", ours, rates, fits, config))
    return fitted


def _throughputs(m: Measured) -> list[float]:
    return [repeat.throughput for repeat in m.repeats]


def _forecast(
    name: str, ours: list[Measured], rates: Mapping[str, Estimate], fits: tuple[ScalingFit, ...], config: CompareConfig
) -> Family:
    # What lies nearest to the counts that were not measured; the other cells check the model.
    base = max(ours, key=lambda m: m.cell.workers)
    workers = max(1, base.cell.workers)
    volume = float(base.meta.get("exchange_bytes") or 0)
    gbit, microseconds = config.interconnect.get("bandwidth_gbit"), config.interconnect.get("latency_us")
    link = measure_link(
        [point for m in ours for point in m.link_points()],
        None if gbit is None else gbit * 1e9 / 8,
        None if microseconds is None else microseconds * 1e-6,
    )
    if link is None or not volume:
        why = "no cell of 2 or more workers was measured, and interconnect.bandwidth_gbit is not given"
        return Family(name, base.cell.id, fits, None, (), None, why)
    model = StepModel(
        workers=workers,
        parallel=base.step_seconds("data", "transfer", "compute"),
        fixed=base.step_seconds("optimizer"),
        reduce=base.step_seconds("reduce"),
        volume=volume,
        samples=base.step_samples(),
        link=link,
        weak=config.mode == "weak",
    )
    checks = {m.cell.workers: rates[m.cell.id].value for m in ours if 0 < m.cell.workers < workers}
    counts = [n for n in FORECAST_COUNTS if n != workers and n not in checks]
    shards = int(base.cell.config["shards"])
    forecasts, worst = forecast(model, base.cell.devices / workers, counts, checks, shards)
    if worst is not None and worst > MAX_MISS:
        why = f"the model misses the measured counts by up to {100 * worst:.0f} %"
        return Family(name, base.cell.id, fits, link, (), worst, why)
    return Family(name, base.cell.id, fits, link, tuple(forecasts), worst, None)
