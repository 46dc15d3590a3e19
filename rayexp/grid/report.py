"""The report of a device grid: every cell's figures, what follows from them, and whether the results are equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayexp.config import CompareConfig
from rayexp.grid.comparison import PLAIN, Cell, Comparison
from rayexp.grid.families import CellGroup, Family, equal_groups, families, family_of
from rayexp.grid.measured import STEP_PHASES, Measured, differing, read_measured
from rayexp.grid.statistics import Estimate, karp_flatt


@dataclass(frozen=True, slots=True)
class CellReport:
    """One measured cell and what follows from it. Estimates are None where there is nothing to compare with.

    Attributes:
        measured: the cell and its repeats.
        rate: samples per second, over all steps.
        epoch: seconds of an ordinary epoch.
        reference: id of the smallest measured cell of the same kind, precision and reduction; None for a plain script.
        speedup: rate over that of `reference`.
        efficiency: speed-up over the ratio of devices.
        serial: Karp and Flatt's serial fraction; None for the reference and under weak scaling.
        over_plain: rate against the plain script on the same kind of device, in the same precision.
        over_ddp: rate of an exact cell against its ddp twin: what exactness costs.
        schedule_seconds: start-up and all epochs of the base experiment, on the data of this comparison.
        cost: of an epoch, in the grid's currency; None without a price.
        target_seconds: from the command until each metric reached its target; None where it did not.
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
            "shutdown_seconds": m.shutdown(),
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
class CompareReport:
    """All of a comparison.

    Attributes:
        comparison: its directory.
        config: the grid.
        meta: compare.json.
        cells: the measured ones, in the order of the plan.
        failed: (cell, repeat, error) of runs that failed or cannot be read.
        skipped: (cell, reason) of cells that were not run.
        missing: how many planned runs have not ended.
        result: id of the cell whose predictions the others are counted against, or None.
        predictions: how many there are in the validation data.
        groups: exact cells that must agree.
        families: fits and forecasts.
    """

    comparison: Comparison
    config: CompareConfig
    meta: Mapping[str, Any]
    cells: tuple[CellReport, ...]
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
        return self.cells[0].measured.unit if self.cells else "samples"

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return self.to_json()

    def to_json(self) -> dict[str, Any]:
        """For `--json`; scripts may rely on `cells`, `failed`, `skipped`, `equal_weights`, `fits` and `forecasts`."""
        return {
            "comparison": self.comparison.id,
            "status": self.meta["status"],
            "mode": self.config.mode,
            "cells": [entry.to_json() for entry in self.cells],
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


def read_report(comparison: Comparison) -> CompareReport:
    """Read a comparison, finished or not.

    Raises:
        UserError: a finished run is damaged, or `target` names a metric that the runs do not have.
    """
    config, meta, cells = comparison.config(), comparison.meta(), comparison.cells()
    measured = read_measured(comparison)
    rates = {m.cell.id: m.rate() for m in measured}
    result = next((m for m in measured if m.cell.reduction == "exact"), None)
    result = result or next((m for m in measured if m.cell.reduction != PLAIN), None)
    reference = result.predictions()[:1] if result else []
    schedule = comparison.base().epochs
    found = []
    for m in measured:
        one = _reference(m, measured, rates)
        rate, epoch = rates[m.cell.id], m.epoch_seconds()
        speedup = rate.over(rates[one.cell.id]) if one else None
        p = m.cell.devices / one.cell.devices if one else 1.0
        price = config.price_per_device_hour.get(m.cell.kind)  # type: ignore[call-overload]
        counts = [differing(p, reference[0]) for p in m.predictions()] if reference and m is not result else []
        known = [count for count in counts if count is not None]
        serial = speedup and p > 1 and config.mode == "strong"
        found.append(
            CellReport(
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
        cells=tuple(found),
        failed=tuple(
            (row.cell, row.repeat, row.error or comparison.lost(row) or "")
            for row in done.values()
            if row.status != "done" or comparison.run(row) is None
        ),
        skipped=tuple((cell.id, cell.skip) for cell in cells if cell.skip is not None),
        missing=sum((cell.id, repeat) not in done for cell, repeat in comparison.missing()),
        result=result.cell.id if result else None,
        predictions=len(reference[0]) if reference else 0,
        groups=equal_groups(measured),
        families=tuple(families(measured, rates, config)),
    )


def _reference(m: Measured, measured: list[Measured], rates: Mapping[str, Estimate]) -> Measured | None:
    """The cell with the fewest devices of the same kind, precision and reduction; of several the fastest."""
    if m.cell.reduction == PLAIN:
        return None
    family = [other for other in measured if family_of(other) == family_of(m)]
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
