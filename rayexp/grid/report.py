"""The report of a device grid: every cell's figures, what follows from them, and whether the results are equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayexp.config import CompareConfig
from rayexp.grid.caveats import caveats
from rayexp.grid.communication import Communication, communication
from rayexp.grid.comparison import PLAIN, Cell, Comparison
from rayexp.grid.families import CellGroup, Family, batch_of, equal_groups, families
from rayexp.grid.measured import STEP_PHASES, Measured, differing, read_measured
from rayexp.grid.scaling import Scaling, scalings
from rayexp.grid.statistics import Estimate
from rayexp.runs.records import Predictions


@dataclass(frozen=True, slots=True)
class CellReport:
    """One measured cell and what follows from it. What is compared is None where there is nothing to compare with.

    Attributes:
        measured: the cell and its repeats.
        rate: samples per second, over all steps.
        epoch: seconds of an ordinary epoch.
        scalings: the cell in each family that it belongs to, strong scaling first; none for a plain script.
        over_plain: rate against the plain script on the same kind of device, in the same precision, of the same batch.
        over_ddp: rate of an exact cell against its ddp twin: what exactness costs.
        schedule_seconds: start-up and all epochs of the base experiment, on the data of this comparison.
        price: of an hour of all its devices, in the grid's currency; None without one.
        target_seconds: from the command until each metric reached its target; None where it did not.
        communication: between the workers; None where there are fewer than two.
        busy: share of the time in which its devices computed, and how that is known; None where it is not.
        result: id of the cell of the same batch with whose predictions this one's are compared; None for a plain
            script.
        differing: (fewest, most) validation predictions unlike that cell's over the repeats.
    """

    measured: Measured
    rate: Estimate
    epoch: Estimate
    scalings: tuple[Scaling, ...]
    over_plain: Estimate | None
    over_ddp: Estimate | None
    schedule_seconds: float
    price: float | None
    target_seconds: Mapping[str, float | None]
    communication: Communication | None
    busy: tuple[float, str] | None
    result: str | None
    differing: tuple[int, int] | None

    @property
    def cell(self) -> Cell:
        """The cell."""
        return self.measured.cell

    @property
    def cost(self) -> float | None:
        """Of an epoch; None without a price."""
        return None if self.price is None else self.price * self.epoch.value / 3600

    @property
    def schedule_cost(self) -> float | None:
        """Of the whole schedule, start-up included; None without a price."""
        return None if self.price is None else self.price * self.schedule_seconds / 3600

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        m = self.measured
        last = m.last

        first = self.scalings[0] if self.scalings else None
        return {
            "cell": self.cell.id,
            "kind": self.cell.kind,
            "workers": self.cell.workers,
            "devices": self.cell.devices,
            "precision": self.cell.precision,
            "reduction": self.cell.reduction,
            "modes": list(self.cell.modes),
            "batch_size": self.cell.config["batch_size"],
            "shards": self.cell.config["shards"],
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
            "step_phases": {phase: m.phase_seconds(phase) for phase in STEP_PHASES},
            "epoch_seconds": self.epoch.to_json(),
            "epoch_phases": m.phases(),
            "startup_seconds": m.startup(),
            "first_step_seconds": m.first_step(),
            "shutdown_seconds": m.shutdown(),
            "wall_seconds": [r.wall for r in m.repeats],
            "phases_off_by": max(r.unaccounted() for r in m.repeats),
            "peak_memory": m.peak_memory(),
            "energy_joules_per_epoch": m.energy(),
            "reference": first and first.reference,
            "speedup": first and first.speedup.to_json(),
            "efficiency": first and first.efficiency and first.efficiency.to_json(),
            "karp_flatt": first and first.serial and first.serial.to_json(),
            "scaling": [one.to_json() for one in self.scalings],
            "speedup_over_plain": self.over_plain and self.over_plain.to_json(),
            "exact_over_ddp": self.over_ddp and self.over_ddp.to_json(),
            "communication": self.communication and self.communication.to_json(),
            "busy": self.busy and {"share": self.busy[0], "measured_by": self.busy[1]},
            "schedule_seconds": self.schedule_seconds,
            "cost_per_epoch": self.cost,
            "cost_of_schedule": self.schedule_cost,
            "seconds_to_target": dict(self.target_seconds),
            "weights_sha": sorted(set(m.shas()) - {""}),
            "compared_with": self.result,
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
        predictions: how many there are in the validation data.
        groups: exact cells that must agree.
        families: fits and forecasts.
        warnings: what makes these figures less than they seem: a busy machine, repeats that differ, idle devices.
    """

    comparison: Comparison
    config: CompareConfig
    meta: Mapping[str, Any]
    cells: tuple[CellReport, ...]
    failed: tuple[tuple[str, int, str], ...]
    skipped: tuple[tuple[str, str], ...]
    missing: int
    predictions: int
    groups: tuple[CellGroup, ...]
    families: tuple[Family, ...]
    warnings: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether exact cells that must agree do."""
        return all(group.equal for group in self.groups)

    @property
    def unit(self) -> str:
        """What rates count: `images`, `tokens` or what else the workload does."""
        return self.cells[0].measured.unit if self.cells else "samples"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The workload's own metrics, in its order."""
        shown = {name for entry in self.cells for name in entry.measured.last.metrics}
        known = [name for name in (self.cells[0].measured.goals if self.cells else ()) if name in shown]
        return (*known, *sorted(shown - set(known)))

    @property
    def moment(self) -> float:
        """Seconds from the command to the end of training of the cell that ended first: what the others had reached by
        then is compared."""
        ends = [float(np.mean([r.elapsed()[-1] for r in entry.measured.repeats])) for entry in self.cells]
        return min((end for end in ends if not math.isnan(end)), default=math.nan)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return self.to_json()

    def to_json(self) -> dict[str, Any]:
        """For `--json`; scripts may rely on `cells`, `failed`, `skipped`, `equal_weights`, `fits` and `forecasts`."""
        return {
            "comparison": self.comparison.id,
            "status": self.meta["status"],
            "modes": list(self.config.mode),
            "cells": [entry.to_json() | {"at_equal_time": self._at_equal_time(entry)} for entry in self.cells],
            "equal_time_seconds": self.moment,
            "warnings": list(self.warnings),
            "failed": [{"cell": c, "repeat": r, "error": e} for c, r, e in self.failed],
            "skipped": [{"cell": c, "reason": why} for c, why in self.skipped],
            "missing": self.missing,
            "equal_weights": self.equal,
            "groups": [
                {"name": g.name, "cells": list(g.cells), "runs": g.runs, "weights_sha": list(g.shas), "equal": g.equal}
                for g in self.groups
            ],
            "validation_predictions": self.predictions,
            "fits": {f.name: [fit.to_json() for fit in f.fits] for f in self.families},
            "forecasts": {f.name: f.to_json() for f in self.families},
            "environment": self.meta["environment"],
        }

    def _at_equal_time(self, entry: CellReport) -> dict[str, float | None]:
        return {name: entry.measured.at(self.moment, name) for name in ("val_loss", *self.metrics)}


def read_report(comparison: Comparison) -> CompareReport:
    """Read a comparison, finished or not.

    Raises:
        UserError: a finished run is damaged, or `target` names a metric that the runs do not have.
    """
    config, meta, cells = comparison.config(), comparison.meta(), comparison.cells()
    measured = read_measured(comparison)
    rates = {m.cell.id: m.rate() for m in measured}
    compared = scalings(measured, rates)
    found = families(measured, config)
    links = {family.key: family.link for family in found}
    references = _references(measured)
    schedule = comparison.base().epochs
    entries = []
    for m in measured:
        epoch = m.epoch_seconds()
        price = config.price_per_device_hour.get(m.cell.kind)  # type: ignore[call-overload]
        reference, predictions = references.get(batch_of(m), (None, []))
        counts = [differing(p, predictions[0]) for p in m.predictions()] if predictions and m is not reference else []
        known = [count for count in counts if count is not None]
        mine = tuple(one for one in compared if one.cell == m.cell.id)
        entries.append(
            CellReport(
                measured=m,
                rate=rates[m.cell.id],
                epoch=epoch,
                scalings=mine,
                over_plain=_over(m, measured, rates, reduction=PLAIN),
                over_ddp=_over(m, measured, rates, reduction="ddp") if m.cell.reduction == "exact" else None,
                schedule_seconds=m.startup() + schedule * epoch.value,
                price=None if price is None else price * m.cell.devices,
                target_seconds={name: m.seconds_to(name, goal) for name, goal in config.target.items()},
                communication=communication(m, links.get(mine[0].key)) if mine else None,
                busy=m.busy(),
                result=reference.cell.id if reference and m.cell.reduction != PLAIN else None,
                differing=(min(known), max(known)) if known else None,
            )
        )
    done = {(row.cell, row.repeat): row for row in comparison.rows()}
    return CompareReport(
        comparison=comparison,
        config=config,
        meta=meta,
        cells=tuple(entries),
        failed=tuple(
            (row.cell, row.repeat, row.error or comparison.lost(row) or "")
            for row in done.values()
            if row.status != "done" or comparison.run(row) is None
        ),
        skipped=tuple((cell.id, cell.skip) for cell in cells if cell.skip is not None),
        missing=sum((cell.id, repeat) not in done for cell, repeat in comparison.missing()),
        predictions=max((len(predictions[0]) for _, predictions in references.values() if predictions), default=0),
        groups=equal_groups(measured),
        families=tuple(found),
        warnings=tuple(caveats(meta, measured, compared)),
    )


def _references(measured: Sequence[Measured]) -> dict[tuple[int, int], tuple[Measured, list[Predictions]]]:
    """For each batch, the cell whose result the others are compared with, and its first repeat's predictions: exact if
    there is one. Another batch gives another model, so nothing is compared across."""
    found: dict[tuple[int, int], tuple[Measured, list[Predictions]]] = {}
    for m in sorted(measured, key=lambda m: m.cell.reduction != "exact"):
        if m.cell.reduction != PLAIN and batch_of(m) not in found:
            found[batch_of(m)] = m, m.predictions()[:1]
    return found


def _over(m: Measured, measured: list[Measured], rates: Mapping[str, Estimate], reduction: str) -> Estimate | None:
    """The rate against that of the plain script, or of the same cell with another reduction."""
    if m.cell.reduction == reduction:
        return None
    mine = m.cell
    for other in measured:
        there = other.cell
        same = (there.kind, there.precision, there.batch) == (mine.kind, mine.precision, mine.batch)
        twin = (there.workers, there.devices, there.modes) == (mine.workers, mine.devices, mine.modes)
        if there.reduction == reduction and same and (twin or reduction == PLAIN):
            return rates[m.cell.id].over(rates[there.id])
    return None
