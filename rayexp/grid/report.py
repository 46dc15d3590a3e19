"""The report of a device grid: every cell's figures, what follows from them, and whether the results are equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayexp.config import CompareConfig
from rayexp.grid.comparison import PLAIN, Cell, Comparison
from rayexp.grid.forecast import Forecast, Link, StepModel, forecast, measure_link
from rayexp.grid.measured import STEP_PHASES, Measured, differing, measure
from rayexp.grid.statistics import Estimate, ScalingFit, fit_amdahl, fit_usl, karp_flatt

FORECAST_COUNTS = (2, 4, 8, 16, 32)
MAX_MISS = 0.5  # relative; a model that is further off at counts that were measured says nothing of others


@dataclass(frozen=True, slots=True)
class Line:
    """One measured cell and what follows from it. Estimates are None where there is nothing to compare with.

    Attributes:
        measured: the cell and its repeats.
        rate: throughput, samples over seconds of all steps.
        epoch: seconds of an ordinary epoch.
        speedup: against `reference`, the smallest measured cell of the same kind, precision and reduction.
        efficiency: speed-up over the ratio of devices.
        serial: Karp and Flatt's serial fraction; None for the reference and under weak scaling.
        over_plain: rate against the plain script on the same kind of device, in the same precision.
        over_ddp: rate of an exact cell against its ddp twin: what exactness costs.
        schedule_seconds: start-up and all epochs of the base experiment, on the data of this comparison.
        cost: of an epoch.
        target_seconds: by metric; None where it was not reached.
        differing: (fewest, most) validation predictions unlike the reference result's over the repeats.
    """

    measured: Measured
    rate: Estimate
    epoch: Estimate
    reference: str | None
    speedup: Estimate | None
    efficiency: Estimate | None
    serial: Estimate | None
    over_plain: Estimate | None
    over_ddp: Estimate | None
    schedule_seconds: float
    cost: float | None
    target_seconds: Mapping[str, float | None]
    differing: tuple[int, int] | None

    @property
    def cell(self) -> Cell:
        """The cell."""
        return self.measured.cell

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        m = self.measured
        last = m.last

        def plain(estimate: Estimate | None) -> dict[str, float] | None:
            return None if estimate is None else estimate.to_json()

        return {
            "cell": self.cell.id,
            "kind": self.cell.kind,
            "workers": self.cell.workers,
            "devices": self.cell.devices,
            "precision": self.cell.precision,
            "reduction": self.cell.reduction,
            "repeats": len(m.repeats),
            "unit": m.unit,
            "samples_per_second": {
                **self.rate.to_json(),
                "throughput": sum(r.throughput for r in m.repeats) / len(m.repeats),
                "repeats": [r.throughput for r in m.repeats],
            },
            "step_seconds": {
                **m.step_seconds().to_json(),
                "median": m.step_median(),
                "p95": m.step_p95(),
                "steps": sum(len(r.steps["total"]) for r in m.repeats),
            },
            "step_phases": {phase: m.step_seconds(phase).value for phase in STEP_PHASES},
            "epoch_seconds": self.epoch.to_json(),
            "epoch_phases": m.phases(),
            "startup_seconds": m.startup(),
            "first_step_seconds": m.first_step(),
            "shutdown_seconds": sum(r.shutdown for r in m.repeats) / len(m.repeats),
            "wall_seconds": [r.wall for r in m.repeats],
            "phases_off_by": max(r.unaccounted() for r in m.repeats),
            "peak_memory": m.peak_memory(),
            "energy_joules_per_epoch": m.energy(),
            "reference": self.reference,
            "speedup": plain(self.speedup),
            "efficiency": plain(self.efficiency),
            "karp_flatt": plain(self.serial),
            "speedup_over_plain": plain(self.over_plain),
            "exact_over_ddp": plain(self.over_ddp),
            "schedule_seconds": self.schedule_seconds,
            "cost_per_epoch": self.cost,
            "seconds_to_target": dict(self.target_seconds),
            "weights_sha": sorted(set(m.shas()) - {""}),
            "differing_predictions": None if self.differing is None else list(self.differing),
            "val_loss": last.val_loss,
            **last.metrics,
            "runs": [r.run.id for r in m.repeats],
        }


@dataclass(frozen=True, slots=True)
class CellGroup:
    """Exact cells that must give the same weights: one kind of device, one precision, one batch and its shards."""

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
        where = f"{self.runs} exact run{'s' * (self.runs != 1)} of {len(self.cells)} cell{'s' * (len(self.cells) != 1)}"
        if self.runs == 1:
            return f"{self.name}: one exact run ({self.shas[0][:12]}), and none to compare it with"
        if self.equal:
            return f"{self.name}: {where} ended with the same weights ({self.shas[0][:12]})"
        return f"{self.name}: {where} ended with {len(self.shas)} DIFFERENT weights"


@dataclass(frozen=True, slots=True)
class Family:
    """The cells of one kind, precision and reduction: fits and forecasts."""

    name: str
    base: str
    fits: tuple[ScalingFit, ...]
    link: Link | None
    forecasts: tuple[Forecast, ...]
    worst_miss: float | None
    why_not: str | None


@dataclass(frozen=True, slots=True)
class CompareReport:
    """All of a comparison."""

    comparison: Comparison
    config: CompareConfig
    meta: Mapping[str, Any]
    lines: tuple[Line, ...]
    failed: tuple[tuple[str, int, str], ...]
    skipped: tuple[tuple[str, str], ...]
    missing: int
    result: str | None
    predictions: int
    groups: tuple[CellGroup, ...]
    families: tuple[Family, ...]

    @property
    def equal(self) -> bool:
        """Whether exact cells that must agree do."""
        return all(group.equal for group in self.groups)

    @property
    def unit(self) -> str:
        """`images` or `tokens`."""
        return self.lines[0].measured.unit if self.lines else "samples"

    def to_json(self) -> dict[str, Any]:
        """For `--json`; scripts may rely on `cells`, `failed`, `skipped`, `equal_weights`, `fits` and `forecasts`."""
        return {
            "comparison": self.comparison.id,
            "status": self.meta["status"],
            "mode": self.config.mode,
            "cells": [line.to_json() for line in self.lines],
            "failed": [{"cell": c, "repeat": r, "error": e} for c, r, e in self.failed],
            "skipped": [{"cell": c, "reason": why} for c, why in self.skipped],
            "missing": self.missing,
            "equal_weights": self.equal,
            "groups": [
                {"name": g.name, "cells": list(g.cells), "runs": g.runs, "weights_sha": list(g.shas), "equal": g.equal}
                for g in self.groups
            ],
            "reference_result": self.result,
            "validation_predictions": self.predictions,
            "fits": {f.name: [fit.to_json() for fit in f.fits] for f in self.families},
            "forecasts": {
                f.name: {
                    "from": f.base,
                    "interconnect": f.link and f.link.to_json(),
                    "worst_miss": f.worst_miss,
                    "refused": f.why_not,
                    "rates": [one.to_json() for one in f.forecasts],
                }
                for f in self.families
            },
            "environment": self.meta["environment"],
        }


def compare(comparison: Comparison) -> CompareReport:
    """Read a comparison, finished or not.

    Raises:
        UserError: a finished run is damaged, or `target` names a metric that the runs do not have.
    """
    config, meta, cells = comparison.config(), comparison.meta(), comparison.cells()
    measured = measure(comparison)
    rates = {m.cell.id: m.rate() for m in measured}
    result = next((m for m in measured if m.cell.reduction == "exact"), None)
    result = result or next((m for m in measured if m.cell.reduction != PLAIN), None)
    reference = result.predictions()[:1] if result else []
    schedule = comparison.base().epochs
    lines = []
    for m in measured:
        one = _reference(m, measured, rates)
        rate, epoch = rates[m.cell.id], m.epoch_seconds()
        speedup = rate.over(rates[one.cell.id]) if one else None
        p = m.cell.devices / one.cell.devices if one else 1.0
        price = config.price_per_device_hour.get(m.cell.kind)  # type: ignore[call-overload]
        counts = [differing(p, reference[0]) for p in m.predictions()] if reference and m is not result else []
        known = [count for count in counts if count is not None]
        serial = speedup and p > 1 and config.mode == "strong"
        lines.append(
            Line(
                measured=m,
                rate=rate,
                epoch=epoch,
                reference=one.cell.id if one else None,
                speedup=speedup,
                efficiency=speedup.map(lambda s, p=p: s / p) if speedup else None,
                serial=speedup.map(lambda s, p=p: karp_flatt(s, p)) if serial and speedup else None,
                over_plain=_over(m, measured, rates, reduction=PLAIN),
                over_ddp=_over(m, measured, rates, reduction="ddp") if m.cell.reduction == "exact" else None,
                schedule_seconds=m.startup() + schedule * epoch.value,
                cost=None if price is None else price * m.cell.devices * epoch.value / 3600,
                target_seconds={name: m.seconds_to(name, goal) for name, goal in config.target.items()},
                differing=(min(known), max(known)) if known else None,
            )
        )
    done = {(row.cell, row.repeat): row for row in comparison.rows()}
    return CompareReport(
        comparison=comparison,
        config=config,
        meta=meta,
        lines=tuple(lines),
        failed=tuple(
            (row.cell, row.repeat, row.error or comparison.lost(row) or "")
            for row in done.values()
            if row.status != "done" or comparison.run(row) is None
        ),
        skipped=tuple((cell.id, cell.skip) for cell in cells if cell.skip is not None),
        missing=sum((cell.id, repeat) not in done for cell, repeat in comparison.missing()),
        result=result.cell.id if result else None,
        predictions=len(reference[0]) if reference else 0,
        groups=_groups(measured),
        families=tuple(_families(measured, rates, config)),
    )


def _family(m: Measured) -> tuple[str, str, str]:
    return m.cell.kind, m.cell.precision, m.cell.reduction


def _reference(m: Measured, measured: list[Measured], rates: Mapping[str, Estimate]) -> Measured | None:
    """The cell with the fewest devices of the same kind, precision and reduction; of several the fastest."""
    if m.cell.reduction == PLAIN:
        return None
    family = [other for other in measured if _family(other) == _family(m)]
    return min(family, key=lambda other: (other.cell.devices, -rates[other.cell.id].value))


def _over(m: Measured, measured: list[Measured], rates: Mapping[str, Estimate], reduction: str) -> Estimate | None:
    """The rate against that of the plain script, or of the same cell with another reduction."""
    if m.cell.reduction == reduction:
        return None
    for other in measured:
        there = other.cell
        same = (there.kind, there.precision) == (m.cell.kind, m.cell.precision)
        twin = reduction == PLAIN or (there.workers, there.devices) == (m.cell.workers, m.cell.devices)
        if there.reduction == reduction and same and twin:
            return rates[m.cell.id].over(rates[there.id])
    return None


def _groups(measured: list[Measured]) -> tuple[CellGroup, ...]:
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


def _families(measured: list[Measured], rates: Mapping[str, Estimate], config: CompareConfig) -> list[Family]:
    families: dict[tuple[str, str, str], list[Measured]] = {}
    for m in measured:
        if m.cell.reduction != PLAIN:
            families.setdefault(_family(m), []).append(m)
    found = []
    for (kind, precision, reduction), members in families.items():
        # In-process cells exchange nothing and may use other cores: the law is that of the workers, where there are.
        ours = [m for m in members if m.cell.workers] or members
        ours.sort(key=lambda m: m.cell.devices)
        points = [(m.cell.devices, r) for m in ours for r in _throughputs(m)]
        fits: tuple[ScalingFit, ...] = ()
        if config.mode == "strong":
            counts, values = [n for n, _ in points], [r for _, r in points]
            fits = (fit_amdahl(counts, values), fit_usl(counts, values))
        found.append(_forecast(f"{kind}, {precision}, {reduction}", ours, rates, fits, config))
    return found


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
