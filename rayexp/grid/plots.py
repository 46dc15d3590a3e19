"""The figures of a comparison's page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rayexp.grid.measured import value_of
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
    from rayexp.grid.scaling import Scaling


def rates(report: CompareReport, kind: str) -> str:
    """Rate of every cell on one kind of device with its interval, and each repeat as a dot."""
    entries = [entry for entry in report.cells if entry.cell.kind == kind]

    def fill(ax: Any) -> None:
        for y, entry in enumerate(entries):
            value = entry.rate.value
            low, high = entry.rate.interval or (value, value)
            ax.barh(y, value, height=bar_height(ax), color=PALE, edgecolor=COLOURS[0], linewidth=0.8)
            ax.plot([low, high], [y, y], color=INK, linewidth=1.6, solid_capstyle="butt")
            dots = [r.throughput for r in entry.measured.repeats]
            ax.plot(dots, [y] * len(dots), "o", markersize=3.6, color=COLOURS[3], markeredgewidth=0)
            ax.text(reach(entry), y, f"  {short(value)}", va="center", fontsize=8.5)
        name_rows(ax, [entry.cell.id for entry in entries])
        ax.set_xlim(0, (1.3 if narrow(ax) else 1.12) * max(map(reach, entries)))
        ax.set_xlabel(f"{report.unit} per second")

    wide, high = rows_height(len(entries), 0.6)
    return draw(f"fig-rates-{kind}", wide, fill, narrow_height=high)


def reach(entry: CellReport) -> float:
    """The end of what is drawn of a rate: its interval, and every repeat."""
    ends = [repeat.throughput for repeat in entry.measured.repeats]
    return max(entry.rate.value, *ends, *(entry.rate.interval or ()))


Line = tuple["CellReport", "Scaling"]


def speedup(report: CompareReport, kind: str, mode: str) -> str | None:
    """Speed-up over devices of one kind, with the ideal line, intervals and forecasts; None with one count alone."""
    lines = [
        (entry, one)
        for entry in report.cells
        for one in entry.scalings
        if (one.key.kind, one.key.mode) == (kind, mode)
    ]  # fmt: skip
    families = [f for f in report.families if (f.key.kind, f.key.mode) == (kind, mode)]
    counts = {entry.cell.devices for entry, _ in lines}
    ahead = {one.devices for family in families for one in family.forecasts}
    if len(counts) < 2 and not ahead:
        return None

    def fill(ax: Any) -> None:
        first, last = min(counts), max(counts | ahead)
        ax.plot([first, last], [1, last / first], color=COLOURS[6], linewidth=1, label="ideal")
        for i, family in enumerate(families):
            name = family.name.removeprefix(f"{kind}, ")
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            ours = [line for line in lines if line[1].key == family.key]
            aside = 2 ** (0.07 * (i - (len(families) - 1) / 2))  # so that intervals do not hide each other
            _points(ax, [e for e in ours if e[0].cell.workers], name, colour, marker, LINES[i % len(LINES)], aside)
            _points(ax, [e for e in ours if not e[0].cell.workers], f"{name}, in-process", colour, "*", "", aside)
            _forecasts(ax, family, ours, name, colour, marker, aside)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xticks(sorted(counts | ahead))
        ax.minorticks_off()
        ax.set_xlabel("GPUs" if kind == "gpu" else "CPU cores")
        ax.set_ylabel("scaled speed-up" if mode == "weak" else "speed-up")
        legend(ax)

    return draw(f"fig-{mode}-{kind}", 3.6, fill, narrow_height=4.2)


def _points(ax: Any, lines: Sequence[Line], name: str, colour: str, marker: str, style: str, aside: float) -> None:
    shown = sorted(lines, key=lambda line: line[0].cell.devices)
    if not shown:
        return
    x = [entry.cell.devices * aside for entry, _ in shown]
    y = np.array([one.speedup.value for _, one in shown])
    bounds = np.array([one.speedup.interval or (one.speedup.value,) * 2 for _, one in shown])
    ax.errorbar(
        x, y, np.abs(bounds.T - y), color=colour, marker=marker, markersize=6 if style else 10, capsize=3,
        linestyle=style or "none", linewidth=1.3, label=name,
    )  # fmt: skip


def _forecasts(
    ax: Any, family: Family, lines: Sequence[Line], name: str, colour: str, marker: str, aside: float
) -> None:
    base = next((line for line in lines if line[0].cell.id == family.base), None)
    if base is None or not family.forecasts:
        return
    scale = base[1].speedup.value / base[0].rate.value
    x = [one.devices * aside for one in family.forecasts]
    y = [one.rate * scale for one in family.forecasts]
    spread = [
        [(o.rate - o.low) * scale for o in family.forecasts],
        [(o.high - o.rate) * scale for o in family.forecasts],
    ]
    ax.errorbar(
        x, y, np.maximum(spread, 0), color=colour, marker=marker, markersize=6, linestyle="none", capsize=3, alpha=0.55,
        elinewidth=0.8, markerfacecolor="none", label=f"{name}\nFORECAST, not measured",
    )  # fmt: skip


def batches(report: CompareReport) -> str | None:
    """Rate over the batch size, a line for every way to compute; None where there is one batch size alone."""
    lines: dict[str, list[CellReport]] = {}
    for entry in report.cells:
        lines.setdefault(entry.cell.id.removesuffix(f"-b{entry.cell.batch}"), []).append(entry)
    swept = {name: entries for name, entries in lines.items() if len(entries) > 1}
    if not swept:
        return None

    def fill(ax: Any) -> None:
        for i, (name, entries) in enumerate(swept.items()):
            x = [entry.cell.config["batch_size"] for entry in entries]
            y = np.array([entry.rate.value for entry in entries])
            bounds = np.array([entry.rate.interval or (entry.rate.value,) * 2 for entry in entries])
            ax.errorbar(
                x, y, np.abs(bounds.T - y), color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                linestyle=LINES[i // len(COLOURS) % len(LINES)], markersize=5, linewidth=1.3, capsize=3, label=name,
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xticks(sorted({entry.cell.config["batch_size"] for entries in swept.values() for entry in entries}))
        ax.minorticks_off()
        ax.set_ylim(0, 1.08 * max(reach(entry) for entries in swept.values() for entry in entries))
        ax.set_xlabel("batch size (of all workers together)")
        ax.set_ylabel(f"{report.unit} per second")
        legend(ax)

    extra = 0.22 * len(swept)
    return draw("fig-batches", max(3.0, 0.4 + extra), fill, narrow_height=3.0 + extra)


def phases(report: CompareReport, kind: str) -> str:
    """Stacked seconds of an ordinary epoch by phase, one bar for every cell on one kind of device."""
    entries = [entry for entry in report.cells if entry.cell.kind == kind]
    bars = [entry.measured.phases() for entry in entries]
    return stacked_bars(f"fig-phases-{kind}", [entry.cell.id for entry in entries], bars, "seconds of an epoch")


def over_time(report: CompareReport) -> list[tuple[str, str]]:
    """Name and figure of the validation loss, and of the workload's first metric, over the wall-clock."""
    return [(name, _over_time(report, name)) for name in ("val_loss", *report.metrics[:1])]


def _over_time(report: CompareReport, metric: str) -> str:
    """A metric over wall-clock, first repeat of every cell, start-up included."""
    entries = [entry for entry in report.cells if not math.isnan(entry.measured.repeats[0].startup)]

    def fill(ax: Any) -> None:
        for i, entry in enumerate(entries):
            repeat = entry.measured.repeats[0]
            ax.plot(
                repeat.elapsed(), [value_of(r, metric) for r in repeat.records], color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], linestyle=LINES[i // len(COLOURS) % len(LINES)],
                markersize=5, linewidth=1.3, label=entry.cell.id,
            )  # fmt: skip
        if not math.isnan(report.moment):
            ax.axvline(report.moment, color=COLOURS[6], linewidth=0.8)
        ax.set_xlabel("seconds since the command, start-up included (line: the first cell has ended)")
        ax.set_ylabel("validation loss" if metric == "val_loss" else metric)
        ax.set_xlim(left=0)
        legend(ax)

    extra = 0.22 * len(entries)
    return draw(f"fig-time-{metric}", max(3.0, 0.4 + extra), fill, narrow_height=3.0 + extra)
