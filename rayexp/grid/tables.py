"""The tables of a device grid as text, the same for the terminal, the Markdown and the page: here a column is added."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rayexp.display import counted, figure, seconds, short
from rayexp.grid.families import Family
from rayexp.grid.report import CellReport, CompareReport
from rayexp.grid.statistics import Estimate

Table = list[dict[str, str]]


def number(value: float | None, unit: str = "") -> str:
    """Three or four significant digits; empty for None."""
    if value is None or math.isnan(value):
        return ""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if value else "0"
    return text + unit


def between(estimate: Estimate | None, suffix: str = "") -> str:
    """`84.1 (82.9 to 85.3)`."""
    if estimate is None:
        return ""
    low, high = estimate.interval
    return f"{number(estimate.value)}{suffix} ({number(low)} to {number(high)})"


def value(estimate: Estimate | None, unit: str = "") -> str:
    """An estimate without its interval; empty for None."""
    return "" if estimate is None else number(estimate.value, unit)


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
        text: what it says of a cell; a column that is empty for every cell is not shown.
        on: `narrow`: only on a narrow terminal; `wide`: everywhere else; `all`: everywhere.
    """

    head: str
    text: Callable[[CellReport], str]
    on: Literal["all", "wide", "narrow"] = "all"


def speed(report: CompareReport, narrow: bool = False) -> Table:
    """Rates and what follows from them."""
    return _table(report, _speed(report), narrow)


def time_and_cost(report: CompareReport, narrow: bool = False) -> Table:
    """Seconds of everything, memory, energy and money."""
    return _table(report, _time_and_cost(report), narrow)


def results(report: CompareReport, narrow: bool = False) -> Table:
    """What was trained: equal weights, or how many predictions differ."""
    return _table(report, _results(report), narrow)


def _table(report: CompareReport, columns: Sequence[Column], narrow: bool) -> Table:
    shown = [column for column in columns if column.on in ("all", "narrow" if narrow else "wide")]
    return [{column.head: column.text(entry) for column in shown} for entry in report.cells]


def _speed(report: CompareReport) -> list[Column]:
    def interval(estimate: Estimate) -> str:
        low, high = estimate.interval
        return f"{number(low)} to {number(high)}"

    return [
        Column("cell", lambda e: e.cell.id),
        Column("on", devices),
        Column(f"{report.unit}/s (95 %)", lambda e: between(e.rate), "wide"),
        Column(f"{report.unit}/s", lambda e: number(e.rate.value), "narrow"),
        Column("95 %", lambda e: interval(e.rate), "narrow"),
        Column("step", lambda e: seconds(e.measured.step_seconds().value), "wide"),
        Column("median", lambda e: seconds(e.measured.step_median()), "wide"),
        Column("p95", lambda e: seconds(e.measured.step_p95()), "wide"),
        Column("speed-up (95 %)", lambda e: "1" if e.reference == e.cell.id else between(e.speedup), "wide"),
        Column("speed-up", lambda e: value(e.speedup), "narrow"),
        Column("efficiency", lambda e: "" if e.efficiency is None else f"{100 * e.efficiency.value:.0f} %", "wide"),
        Column("serial", lambda e: value(e.serial), "wide"),
        Column("vs plain", lambda e: between(e.over_plain, "x"), "wide"),
        Column("vs plain", lambda e: value(e.over_plain, "x"), "narrow"),
        Column("exact/ddp", lambda e: value(e.over_ddp), "wide"),
    ]


def _time_and_cost(report: CompareReport) -> list[Column]:
    epochs = report.comparison.base().epochs

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
        Column(f"{report.config.currency}/epoch", lambda e: number(e.cost)),
        *(Column(f"to {metric} {goal:g}", reached(metric)) for metric, goal in report.config.target.items()),
    ]


def _results(report: CompareReport) -> list[Column]:
    def weights(entry: CellReport) -> str:
        shas = sorted(set(entry.measured.shas()) - {""})
        if len(shas) > 1:
            return f"{len(shas)} hashes in {counted(len(entry.measured.repeats), 'repeat')}"
        return short(shas[0]) if shas else ""

    def differ(entry: CellReport) -> str:
        if entry.cell.id == report.result:
            return "reference"
        if entry.differing is None:
            return ""
        low, high = entry.differing
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        return f"{span} of {report.predictions:,}"

    def metric(name: str) -> Callable[[CellReport], str]:
        return lambda e: figure(e.measured.last.metrics.get(name), ".3g")

    names = dict.fromkeys(name for entry in report.cells for name in entry.measured.last.metrics)
    return [
        Column("cell", lambda e: e.cell.id),
        Column("weights", weights),
        Column("differ", differ),
        Column("val_loss", lambda e: figure(e.measured.last.val_loss, ".3g")),
        *(Column(name, metric(name)) for name in names),
        Column("repeats", lambda e: str(len(e.measured.repeats)), "wide"),
    ]


def fits(family: Family) -> list[str]:
    """One sentence for each law."""
    found = []
    for fit in family.fits:
        head = f"{fit.law}, {family.name}: "
        if fit.refused:
            found.append(f"{head}no fit; {fit.refused}.")
            continue
        names = ", ".join(
            f"{name} {value:.3g} ({low:.3g} to {high:.3g})"
            for name, (value, low, high) in fit.parameters.items()
            if name != "rate1"
        )
        peak = f"; the rate peaks at {fit.peak:.3g} devices" if fit.peak else ""
        if fit.peak == 1:
            peak = "; the rate falls from the first device on"
        found.append(f"{head}{names}; off by {100 * (fit.error or 0):.1f} % (rms){peak}.")
    return found


def forecasts(report: CompareReport, narrow: bool = False) -> Table:
    """Rates that were not measured."""
    return [
        {
            "FORECAST, not measured": family.name,
            "workers": str(one.workers),
            f"{report.unit}/s": f"{number(one.rate)} ({number(one.low)} to {number(one.high)})",
            "in the exchange": f"{100 * one.share_reduce:.0f} %",
            **({} if narrow else {"note": one.note}),
        }
        for family in report.families
        for one in family.forecasts
    ]


def links(report: CompareReport) -> list[str]:
    """Where each forecast comes from, or why there is none."""
    found = []
    for family in report.families:
        if family.why_not:
            found.append(f"{family.name}: no forecast; {family.why_not}.")
        elif family.link:
            measured = family.link.to_json()
            gbit, micro = measured["bandwidth_gbit"]["value"], measured["latency_us"]["value"]
            miss = "" if family.worst_miss is None else (
                f"; at the measured counts the model was off by up to {100 * family.worst_miss:.0f} %, "
                "and the intervals are widened by that"
            )  # fmt: skip
            link = f"{number(gbit)} Gbit/s and {number(micro)} us ({measured['source']})"
            found.append(f"{family.name}: from {family.base}, {link}{miss}.")
    return found


def machine(report: CompareReport) -> str:
    """One line on machine and versions."""
    e = report.meta["environment"]
    gpus = f", {len(e['gpus'])} x {e['gpus'][0]}" if e["gpus"] else ", no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    return (
        f"{e['cpu']}, {counted(e['cores'], 'core')} ({e['cpu_capability']}), {e['memory_bytes'] / 1e9:.0f} GB{gpus}; "
        f"{e['system']}; Python {e['python']}, {versions}"
    )


def markdown(report: CompareReport) -> str:
    """The whole report for a paper or a README."""
    parts = [f"# {report.comparison.id}", machine(report), "## Speed", pipe(speed(report))]
    parts += ["## Time", pipe(time_and_cost(report)), "## Results", pipe(results(report))]
    parts += ["\n".join(f"- {g.sentence()}" for g in report.groups)]
    laws = [f"- {sentence}" for family in report.families for sentence in fits(family)]
    parts += ["## Laws and forecasts", "\n".join([*laws, *(f"- {sentence}" for sentence in links(report))])]
    if any(f.forecasts for f in report.families):
        parts.append(pipe(forecasts(report)))
    if report.skipped or report.failed:
        rows = [{"cell": c, "did not run": why} for c, why in report.skipped]
        rows += [{"cell": f"{c}, repeat {r}", "did not run": f"failed: {e}"} for c, r, e in report.failed]
        parts += ["## Not measured", pipe(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def pipe(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table; columns that are empty in every row are left out."""
    if not rows:
        return ""
    names = filled(rows)
    lines = ["| " + " | ".join(names) + " |", "|" + "|".join(" --- " for _ in names) + "|"]
    lines += ["| " + " | ".join(row[n].replace("|", "\\|") for n in names) + " |" for row in rows]
    return "\n".join(lines)


def filled(rows: Sequence[dict[str, str]]) -> list[str]:
    """The columns in which any row has something."""
    return [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
