"""How `rayexp compare` reads on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rayexp.cli._output import print_table, tell, terminal_width
from rayexp.display import counted

if TYPE_CHECKING:
    from rayexp.config import CompareConfig
    from rayexp.grid.comparison import Cell
    from rayexp.grid.report import CompareReport

WIDE = 150  # columns of a terminal that hold every column of the tables


def plan_json(cells: Sequence[Cell], config: CompareConfig) -> dict[str, Any]:
    """The plan for `--dry-run --json`."""
    names = ("id", "kind", "workers", "devices", "precision", "reduction", "modes", "batch", "skip")
    return {
        "modes": list(config.mode),
        "repeats": config.repeats,
        "cells": [{name: getattr(cell, name) for name in names} for cell in cells],
    }


def show_plan(cells: Sequence[Cell], config: CompareConfig) -> None:
    """Which cells run, which do not and why."""
    running = sum(cell.skip is None for cell in cells)
    title = (
        f"{running} of {counted(len(cells), 'cell')} run here, {counted(config.repeats, 'repeat')} each, "
        f"{' and '.join(config.mode)} scaling"
    )
    rows = [
        {
            "cell": cell.id,
            "where": cell.where,
            "devices": counted(cell.devices, "GPU" if cell.kind == "gpu" else "core"),
            "precision": cell.precision,
            "reduction": cell.reduction,
            "plan": "runs" if cell.skip is None else f"skipped: {cell.skip}",
        }
        for cell in cells
    ]
    print_table(rows, title, drop=("where", "reduction", "precision"))


DROP = {
    "Speed": ("on", "95 %", "busy", "vs plain"),
    "Time, memory and cost": ("energy/epoch", "first step", "shutdown"),
    "Results": ("acc5", "val_loss", "differ"),
}
"""Columns that a terminal which is too narrow does not get, by the title of a table; the first goes first."""


def show(report: CompareReport) -> None:
    """Answers, tables, laws, forecasts, and what was not measured. A narrow terminal gets fewer columns."""
    from rayexp.grid import sentences, tables

    if report.cells:
        narrow = (terminal_width(sys.stdout) or WIDE) < WIDE
        for title, rows in sentences.sections(report, narrow):
            names = tables.filled(rows)
            drop = (
                *DROP.get(title, ("on", "of the step", "in the exchange", "step")),
                f"{report.config.currency}/epoch",
            )
            print_table([{name: row[name] for name in names} for row in rows], title, drop)
        for sentence in sentences.answers(report):
            tell(sentence)
    for sentence in (*sentences.laws(report), *sentences.links(report)):
        tell(sentence)
    for warning in report.warnings:
        tell(f"note: {warning}")
    for cell, why in report.skipped:
        tell(f"skipped {cell}: {why}")
    for cell, repeat, error in report.failed:
        tell(f"FAILED {cell}, repeat {repeat}: {error}")
