"""The tables of a device grid as text, the same for the terminal, the Markdown and the page: here a column is added."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayexp.display import counted, figure, seconds, short
from rayexp.grid.communication import Communication
from rayexp.grid.report import CellReport, CompareReport
from rayexp.grid.scaling import Scaling, SerialFraction
from rayexp.grid.statistics import TOO_FEW, Estimate

Table = list[dict[str, str]]


def number(value: float | None, unit: str = "") -> str:
    """Three or four significant digits; empty for None."""
    if value is None or math.isnan(value):
        return ""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if value else "0"
    return text + unit


def between(estimate: Estimate | SerialFraction | None, suffix: str = "") -> str:
    """`84.1 (82.9 to 85.3)`; `84.1 (too few repeats to say)` where that says nothing, and `84.1` with one repeat."""
    if estimate is None:
        return ""
    around = interval(estimate)
    return f"{number(estimate.value)}{suffix}" + (f" ({around})" if around else "")


def interval(estimate: Estimate | SerialFraction) -> str:
    """`82.9 to 85.3`, `too few repeats to say`; empty with one repeat."""
    if estimate.interval is None:
        return TOO_FEW if isinstance(estimate, Estimate) and estimate.open else ""
    return f"{number(estimate.interval[0])} to {number(estimate.interval[1])}"


def value(estimate: Estimate | None, unit: str = "") -> str:
    """An estimate without its interval; empty for None."""
    return "" if estimate is None else number(estimate.value, unit)


def percent(estimate: Estimate | None) -> str:
    """`75 % (71 to 79)`, `75 % (too few repeats to say)`."""
    if estimate is None:
        return ""
    around = f" ({TOO_FEW})" if estimate.open else ""
    if estimate.interval:
        around = f" ({' to '.join(f'{100 * end:.0f}' for end in estimate.interval)})"
    return f"{100 * estimate.value:.0f} %{around}"


def share(part: float | None) -> str:
    """`12 %`; empty for None."""
    return "" if part is None else f"{100 * part:.0f} %"


def memory(entry: CellReport) -> str:
    """`1.4 GB`, `1.4 GB + 3.2 GB GPU`."""
    peaks = entry.measured.peak_memory()
    host = f"{peaks.get('host', 0) / 1e9:.2f} GB"
    return host + (f" + {peaks['device'] / 1e9:.2f} GB GPU" if "device" in peaks else "")


def devices(entry: CellReport) -> str:
    """`2 cores`, `1 GPU`."""
    return counted(entry.cell.devices, "GPU" if entry.cell.kind == "gpu" else "core")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table with a line for every measured cell. A new one is an entry of `_speed`, `_time_and_cost` or
    `_results`: the terminal, the Markdown and the page have it from there.

    Attributes:
        head: its heading.
        text: what it says of a line; a column that is empty in every line is not shown.
        on: `narrow`: only on a narrow terminal; `wide`: everywhere else; `all`: everywhere.
    """

    head: str
    text: Callable[[Any], str]
    on: Literal["all", "wide", "narrow"] = "all"


def _table(lines: Iterable[Any], columns: Sequence[Column], narrow: bool) -> Table:
    shown = [column for column in columns if column.on in ("all", "narrow" if narrow else "wide")]
    return [{column.head: column.text(line) for column in shown} for line in lines]


def speed(report: CompareReport, narrow: bool = False) -> Table:
    """Rates, and how they compare with the plain script and with ddp."""
    return _table(report.cells, _speed(report), narrow)


def scaling(report: CompareReport, mode: str, narrow: bool = False) -> Table:
    """What more devices bring, with strong or with weak scaling; a line for every cell of that mode."""
    entries = {entry.cell.id: entry for entry in report.cells}
    lines = [(entries[one.cell], one) for entry in report.cells for one in entry.scalings if one.key.mode == mode]
    return _table(lines, _scaling(report, [one for _, one in lines]), narrow)


def communication(report: CompareReport, narrow: bool = False) -> Table:
    """Compute against communication, for the cells of two workers or more."""
    lines = [(entry, entry.communication) for entry in report.cells if entry.communication]
    return _table(lines, _communication(), narrow)


def time_and_cost(report: CompareReport, narrow: bool = False) -> Table:
    """Seconds of everything, memory, energy and money."""
    return _table(report.cells, _time_and_cost(report), narrow)


def results(report: CompareReport, narrow: bool = False) -> Table:
    """What was trained: equal weights, or how many predictions differ."""
    return _table(report.cells, _results(report), narrow)


def _speed(report: CompareReport) -> list[Column]:
    def busy(entry: CellReport) -> str:
        return "" if entry.busy is None else share(entry.busy[0])

    return [
        Column("cell", lambda e: e.cell.id),
        Column("on", devices),
        Column(f"{report.unit}/s (95 %)", lambda e: between(e.rate), "wide"),
        Column(f"{report.unit}/s", lambda e: number(e.rate.value), "narrow"),
        Column("95 %", lambda e: interval(e.rate), "narrow"),
        Column("step", lambda e: seconds(e.measured.step_seconds().value), "wide"),
        Column("median", lambda e: seconds(e.measured.step_median()), "wide"),
        Column("p95", lambda e: seconds(e.measured.step_p95()), "wide"),
        Column("vs plain (95 %)", lambda e: between(e.over_plain, "x"), "wide"),
        Column("vs plain", lambda e: value(e.over_plain, "x"), "narrow"),
        Column("exact/ddp", lambda e: value(e.over_ddp), "wide"),
        Column("busy", busy),
    ]


def _scaling(report: CompareReport, lines: Sequence[Scaling]) -> list[Column]:
    references = list(dict.fromkeys(one.reference for one in lines))
    several = len(references) > 1
    over = "" if several or not references else f" over {references[0]}"

    def speedup(one: Scaling) -> str:
        return "1" if one.is_reference else between(one.speedup)

    def efficiency(one: Scaling) -> str:
        return "100 %" if one.is_reference else percent(one.efficiency)

    def batch(line: tuple[CellReport, Scaling]) -> str:
        return f"{line[0].cell.config['batch_size']:,}"

    return [
        Column("cell", lambda line: line[1].cell),
        Column("on", lambda line: devices(line[0])),
        Column("batch", batch, "wide"),
        Column("step", lambda line: seconds(line[0].measured.step_seconds().value), "wide"),
        Column(f"speed-up{over} (95 %)", lambda line: speedup(line[1]), "wide"),
        Column(f"speed-up{over}", lambda line: speedup(line[1]), "narrow"),
        *([Column("over", lambda line: line[1].reference)] if several else []),
        Column("efficiency (95 %)", lambda line: efficiency(line[1]), "wide"),
        Column("efficiency", lambda line: efficiency(line[1]), "narrow"),
        Column("serial (95 %)", lambda line: between(line[1].serial), "wide"),
    ]


def _communication() -> list[Column]:
    def of(text: Callable[[Communication], str]) -> Callable[[tuple[CellReport, Communication]], str]:
        return lambda line: text(line[1])

    def speed_of(c: Communication) -> str:
        return "" if c.bandwidth is None else number(c.bandwidth / 1e9, " GB/s")

    return [
        Column("cell", lambda line: line[0].cell.id),
        Column("compute", of(lambda c: seconds(c.compute))),
        Column("waits for the sum", of(lambda c: seconds(c.waited))),
        Column("of the step", of(lambda c: share(c.share))),
        Column("summed", of(lambda c: number(c.volume / 1e6, " MB"))),
        Column("sent a worker", of(lambda c: number(c.sent / 1e6, " MB")), "wide"),
        Column("bare sum", of(lambda c: seconds(c.bare)), "wide"),
        Column("ring model", of(lambda c: seconds(c.ring)), "wide"),
        Column("effective", of(speed_of)),
        Column("hidden", of(lambda c: share(c.hidden)), "wide"),
    ]


def _time_and_cost(report: CompareReport) -> list[Column]:
    epochs = report.comparison.base().epochs
    currency = report.config.currency

    def reached(metric: str) -> Callable[[CellReport], str]:
        def text(entry: CellReport) -> str:
            took = entry.target_seconds.get(metric)
            return "not reached" if took is None else seconds(took)

        return text

    return [
        Column("cell", lambda e: e.cell.id),
        Column("start-up", lambda e: seconds(e.measured.startup())),
        Column("first step", lambda e: seconds(e.measured.first_step())),
        Column("epoch", lambda e: seconds(e.epoch.value)),
        Column(counted(epochs, "epoch"), lambda e: seconds(e.schedule_seconds)),
        Column("shutdown", lambda e: seconds(e.measured.shutdown()), "wide"),
        Column("as run", lambda e: seconds(e.measured.wall()), "wide"),
        Column("peak memory", memory, "wide"),
        Column("energy/epoch", lambda e: number(e.measured.energy(), " J")),
        Column(f"{currency}/epoch", lambda e: number(e.cost)),
        Column(f"{currency}/{counted(epochs, 'epoch')}", lambda e: number(e.schedule_cost), "wide"),
        *(Column(f"to {metric} {goal:g}", reached(metric)) for metric, goal in report.config.target.items()),
    ]


def _results(report: CompareReport) -> list[Column]:
    several = len({entry.result for entry in report.cells if entry.result}) > 1

    def weights(entry: CellReport) -> str:
        shas = sorted(set(entry.measured.shas()) - {""})
        if len(shas) > 1:
            return f"{len(shas)} hashes in {counted(len(entry.measured.repeats), 'repeat')}"
        return short(shas[0]) if shas else ""

    def differ(entry: CellReport) -> str:
        if entry.cell.id == entry.result:
            return "reference"
        if entry.differing is None:
            return ""
        low, high = entry.differing
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        return f"{span} of {report.predictions:,}" + (f", against {entry.result}" if several else "")

    def metric(name: str) -> Callable[[CellReport], str]:
        return lambda e: figure(e.measured.last.metrics.get(name), ".3g")

    def by_then(entry: CellReport) -> str:
        found = entry.measured.at(report.moment, leading)
        return "no epoch yet" if found is None else figure(found, ".3g")

    leading = next(iter(report.metrics), "val_loss")
    equal_time = (
        [] if math.isnan(report.moment) else [Column(f"{leading} at {seconds(report.moment)}", by_then, "wide")]
    )
    return [
        Column("cell", lambda e: e.cell.id),
        Column("weights", weights),
        Column("differ", differ),
        Column("val_loss", lambda e: figure(e.measured.last.val_loss, ".3g")),
        *(Column(name, metric(name)) for name in report.metrics),
        *equal_time,
        Column("repeats", lambda e: str(len(e.measured.repeats)), "wide"),
    ]


def forecasts(report: CompareReport, narrow: bool = False) -> Table:
    """Rates that were not measured, and where the time of a step would go."""
    lines = [(family, one) for family in report.families for one in family.forecasts]
    columns = [
        Column("FORECAST, not measured", lambda line: line[0].name),
        Column("workers", lambda line: str(line[1].workers)),
        Column(
            f"{report.unit}/s",
            lambda line: f"{number(line[1].rate)} ({number(line[1].low)} to {number(line[1].high)})",
        ),
        Column("shared work", lambda line: seconds(line[1].work_seconds), "wide"),
        Column("floor", lambda line: seconds(line[1].floor_seconds), "wide"),
        Column("exchange", lambda line: seconds(line[1].exchange_seconds), "wide"),
        Column("in the exchange", lambda line: share(line[1].share_reduce)),
        Column("note", lambda line: line[1].note, "wide"),
    ]
    return _table(lines, columns, narrow)


def filled(rows: Sequence[dict[str, str]]) -> list[str]:
    """The columns in which any row has something."""
    return [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
