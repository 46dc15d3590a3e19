"""The figures of a comparison's page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rayexp.pages.plots import (
    COLOURS,
    INK,
    LINES,
    MARKERS,
    PALE,
    bar_height,
    draw,
    legend,
    name_rows,
    narrow,
    rows_height,
    short,
    stacked_bars,
)

if TYPE_CHECKING:
    from rayexp.grid.families import Family
    from rayexp.grid.report import CellReport, CompareReport


def rates(report: CompareReport, kind: str) -> str:
    """Rate of every cell on one kind of device with its interval, and each repeat as a dot."""
    entries = [entry for entry in report.cells if entry.cell.kind == kind]

    def fill(ax: Any) -> None:
        for y, entry in enumerate(entries):
            low, high = entry.rate.interval
            value = entry.rate.value
            ax.barh(y, value, height=bar_height(ax), color=PALE, edgecolor=COLOURS[0], linewidth=0.8)
            ax.plot([low, high], [y, y], color=INK, linewidth=1.6, solid_capstyle="butt")
            dots = [r.throughput for r in entry.measured.repeats]
            ax.plot(dots, [y] * len(dots), "o", markersize=3.6, color=COLOURS[3], markeredgewidth=0)
            ax.text(max(high, value), y, f"  {short(value)}", va="center", fontsize=8.5)
        name_rows(ax, [entry.cell.id for entry in entries])
        ax.set_xlim(
            0, (1.3 if narrow(ax) else 1.12) * max(max(entry.rate.interval[1], entry.rate.value) for entry in entries)
        )
        ax.set_xlabel(f"{report.unit} per second")

    wide, high = rows_height(len(entries), 0.6)
    return draw(f"fig-rates-{kind}", wide, fill, narrow_height=high)


def speedup(report: CompareReport, kind: str) -> str | None:
    """Speed-up over devices of one kind, with the ideal line, intervals and forecasts; None with one count alone."""
    entries = [entry for entry in report.cells if entry.cell.kind == kind and entry.speedup is not None]
    families = [f for f in report.families if f.name.startswith(f"{kind}, ")]
    if len({entry.cell.devices for entry in entries}) < 2 and not any(f.forecasts for f in families):
        return None

    def fill(ax: Any) -> None:
        first = min(entry.cell.devices for entry in entries)
        last = max([entry.cell.devices for entry in entries] + [o.devices for f in families for o in f.forecasts])
        ax.plot([first, last], [1, last / first], color=COLOURS[6], linewidth=1, label="ideal")
        for i, family in enumerate(families):
            name = family.name.removeprefix(f"{kind}, ")
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            ours = [
                entry for entry in entries if f"{kind}, {entry.cell.precision}, {entry.cell.reduction}" == family.name
            ]
            aside = 2 ** (0.07 * (i - (len(families) - 1) / 2))  # so that intervals do not hide each other
            _points(ax, [e for e in ours if e.cell.workers], name, colour, marker, LINES[i % len(LINES)], aside)
            _points(ax, [e for e in ours if not e.cell.workers], f"{name}, in-process", colour, "*", "", aside)
            _forecasts(ax, family, ours, colour, marker, aside)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xticks(
            sorted({entry.cell.devices for entry in entries} | {o.devices for f in families for o in f.forecasts})
        )
        ax.minorticks_off()
        ax.set_xlabel("GPUs" if kind == "gpu" else "CPU cores")
        ax.set_ylabel("scaled speed-up" if report.config.mode == "weak" else "speed-up")
        legend(ax)

    return draw(f"fig-speedup-{kind}", 3.6, fill, narrow_height=4.2)


def _points(
    ax: Any, entries: Sequence[CellReport], name: str, colour: str, marker: str, style: str, aside: float
) -> None:
    shown = sorted((entry for entry in entries if entry.speedup), key=lambda entry: entry.cell.devices)
    if not shown:
        return
    x = [entry.cell.devices * aside for entry in shown]
    y = [entry.speedup.value for entry in shown if entry.speedup]
    bounds = np.array([entry.speedup.interval for entry in shown if entry.speedup])
    spread = np.abs(bounds.T - np.array(y))
    ax.errorbar(
        x, y, spread, color=colour, marker=marker, markersize=6 if style else 10, linestyle=style or "none",
        capsize=3, linewidth=1.3, label=name,
    )  # fmt: skip


def _forecasts(ax: Any, family: Family, ours: Sequence[CellReport], colour: str, marker: str, aside: float) -> None:
    base = next((entry for entry in ours if entry.cell.id == family.base), None)
    if base is None or not family.forecasts or base.speedup is None:
        return
    scale = base.speedup.value / base.rate.value
    x = [one.devices * aside for one in family.forecasts]
    y = [one.rate * scale for one in family.forecasts]
    spread = [
        [(o.rate - o.low) * scale for o in family.forecasts],
        [(o.high - o.rate) * scale for o in family.forecasts],
    ]
    ax.errorbar(
        x, y, np.maximum(spread, 0), color=colour, marker=marker, markersize=6, linestyle="none", capsize=3, alpha=0.55,
        elinewidth=0.8, markerfacecolor="none", label=f"{family.name.partition(', ')[2]}\nFORECAST, not measured",
    )  # fmt: skip


def phases(report: CompareReport, kind: str) -> str:
    """Stacked seconds of an ordinary epoch by phase, one bar for every cell on one kind of device."""
    entries = [entry for entry in report.cells if entry.cell.kind == kind]
    bars = [entry.measured.phases() for entry in entries]
    return stacked_bars(f"fig-phases-{kind}", [entry.cell.id for entry in entries], bars, "seconds of an epoch")


def losses(report: CompareReport) -> str:
    """Validation loss over wall-clock, first repeat of every cell, start-up included."""
    entries = [entry for entry in report.cells if not math.isnan(entry.measured.repeats[0].startup)]

    def fill(ax: Any) -> None:
        for i, entry in enumerate(entries):
            repeat = entry.measured.repeats[0]
            ax.plot(
                repeat.elapsed(), [r.val_loss for r in repeat.records], color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], linestyle=LINES[i // len(COLOURS) % len(LINES)],
                markersize=5, linewidth=1.3, label=entry.cell.id,
            )  # fmt: skip
        ax.set_xlabel("seconds since the command, start-up included")
        ax.set_ylabel("validation loss (nats)")
        ax.set_xlim(left=0)
        legend(ax)

    extra = 0.22 * len(entries)
    return draw("fig-losses", max(3.0, 0.4 + extra), fill, narrow_height=3.0 + extra)
