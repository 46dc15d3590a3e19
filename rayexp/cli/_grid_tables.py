"""How `rayexp compare` reads on a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rayexp.cli._output import print_table, tell

if TYPE_CHECKING:
    from rayexp.config import CompareConfig
    from rayexp.grid.comparison import Cell
    from rayexp.grid.report import CompareReport

WIDE = 150  # columns of a terminal that hold the report's own tables
NARROW = ("median", "shutdown", "as run", "peak memory", "note", "repeats")  # what a narrower one goes without


def plan_json(cells: Sequence[Cell], config: CompareConfig) -> dict[str, Any]:
    """The plan for `--dry-run --json`."""
    names = ("id", "kind", "workers", "devices", "precision", "reduction", "skip")
    return {
        "mode": config.mode,
        "repeats": config.repeats,
        "cells": [{name: getattr(cell, name) for name in names} for cell in cells],
    }


def show_plan(cells: Sequence[Cell], config: CompareConfig) -> None:
    """Which cells run, which do not and why."""
    running = sum(cell.skip is None for cell in cells)
    title = (
        f"{running} of {len(cells)} cells run here, {config.repeats} repeat{'s' * (config.repeats != 1)} each, "
        f"{config.mode} scaling"
    )
    rows = [
        {
            "cell": cell.id,
            "where": cell.where,
            "devices": f"{cell.devices:g} {'GPU' if cell.kind == 'gpu' else 'core'}{'s' * (cell.devices != 1)}",
            "precision": cell.precision,
            "reduction": cell.reduction,
            "plan": "runs" if cell.skip is None else f"skipped: {cell.skip}",
        }
        for cell in cells
    ]
    print_table(rows, title)


def show(report: CompareReport) -> None:
    """Tables, equality, laws, forecasts, and what was not measured. A narrow terminal gets fewer columns."""
    from rayexp.grid import tables

    if report.lines:
        wide = not sys.stdout.isatty() or shutil.get_terminal_size().columns >= WIDE
        dropped = () if wide else NARROW
        for title, rows in (
            (
                "speed (samples over seconds of all steps; 95 % intervals)",
                tables.speed(report) if wide else _narrow_speed(report),
            ),
            ("time and memory", tables.time_and_cost(report)),
            ("results after the last epoch", tables.results(report)),
            ("forecasts: these were NOT measured", tables.forecasts(report)),
        ):
            names = [name for name in tables.filled(rows) if name not in dropped]
            if rows:
                print_table([{name: row[name] for name in names} for row in rows], title)
    for family in report.families:
        for sentence in tables.fits(family):
            tell(sentence)
    for sentence in tables.links(report):
        tell(sentence)
    for cell, why in report.skipped:
        tell(f"skipped {cell}: {why}")
    for cell, repeat, error in report.failed:
        tell(f"FAILED {cell}, repeat {repeat}: {error}")
    for group in report.groups:
        tell(group.sentence())


def _narrow_speed(report: CompareReport) -> list[dict[str, str]]:
    from rayexp.grid import tables

    rows = []
    for line in report.lines:
        low, high = line.rate.interval
        rows.append(
            {
                "cell": line.cell.id,
                "on": tables.devices(line),
                f"{report.unit}/s": tables.number(line.rate.value),
                "95 %": f"{tables.number(low)} to {tables.number(high)}",
                "speed-up": "" if line.speedup is None else tables.number(line.speedup.value),
                "vs plain": "" if line.over_plain is None else f"{tables.number(line.over_plain.value)}x",
            }
        )
    return rows
