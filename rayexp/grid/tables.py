"""The tables of a device grid as text, the same for the terminal, for Markdown and for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rayexp.display import figure, seconds
from rayexp.grid.report import CompareReport, Family, Line
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


def memory(line: Line) -> str:
    """`1.4 GB`, `1.4 GB + 3.2 GB GPU`."""
    peaks = line.measured.peak_memory()
    host = f"{peaks.get('host', 0) / 1e9:.2f} GB"
    return host + (f" + {peaks['device'] / 1e9:.2f} GB GPU" if "device" in peaks else "")


def devices(line: Line) -> str:
    """`2 cores`, `1 GPU`."""
    n = line.cell.devices
    return f"{n:g} {'GPU' if line.cell.kind == 'gpu' else 'core'}{'s' * (n != 1)}"


def speed(report: CompareReport) -> Table:
    """Rates and what follows from them."""
    return [
        {
            "cell": line.cell.id,
            "on": devices(line),
            f"{report.unit}/s (95 %)": between(line.rate),
            "step": seconds(line.measured.step_seconds().value),
            "median": seconds(line.measured.step_median()),
            "p95": seconds(line.measured.step_p95()),
            "speed-up (95 %)": "1" if line.reference == line.cell.id else between(line.speedup),
            "efficiency": "" if line.efficiency is None else f"{100 * line.efficiency.value:.0f} %",
            "serial": "" if line.serial is None else number(line.serial.value),
            "vs plain": between(line.over_plain, "x"),
            "exact/ddp": "" if line.over_ddp is None else number(line.over_ddp.value),
        }
        for line in report.lines
    ]


def time_and_cost(report: CompareReport) -> Table:
    """Seconds of everything, memory, energy and money."""
    rows = []
    epochs = report.comparison.base().epochs
    for line in report.lines:
        m = line.measured
        row = {
            "cell": line.cell.id,
            "start-up": seconds(m.startup()),
            "first step": seconds(m.first_step()),
            "epoch": seconds(line.epoch.value),
            f"{epochs} epoch{'s' * (epochs != 1)}": seconds(line.schedule_seconds),
            "shutdown": seconds(sum(r.shutdown for r in m.repeats) / len(m.repeats)),
            "as run": seconds(sum(r.wall for r in m.repeats) / len(m.repeats)),
            "peak memory": memory(line),
        }
        if any(other.measured.energy() is not None for other in report.lines):
            row["energy/epoch"] = number(m.energy(), " J")
        if report.config.price_per_device_hour:
            row[f"{report.config.currency}/epoch"] = number(line.cost)
        for metric, goal in report.config.target.items():
            reached = line.target_seconds.get(metric)
            row[f"to {metric} {goal:g}"] = "not reached" if reached is None else seconds(reached)
        rows.append(row)
    return rows


def results(report: CompareReport) -> Table:
    """What was trained: equal weights, or how many judgements differ."""
    rows = []
    for line in report.lines:
        m, last = line.measured, line.measured.last
        shas = sorted(set(m.shas()) - {""})
        many = f"{len(shas)} hashes in {len(m.repeats)} repeats"
        if line.cell.id == report.result:
            unlike = "reference"
        elif line.differing is None:
            unlike = ""
        else:
            low, high = line.differing
            span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            unlike = f"{span} of {report.predictions:,}"
        rows.append(
            {
                "cell": line.cell.id,
                "weights": shas[0][:12] if len(shas) == 1 else many if shas else "",
                "differ": unlike,
                "val_loss": figure(last.val_loss, ".3g"),
                **{name: figure(value, ".3g") for name, value in last.metrics.items()},
                "repeats": str(len(m.repeats)),
            }
        )
    return rows


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


def forecasts(report: CompareReport) -> Table:
    """Rates that were not measured."""
    return [
        {
            "FORECAST, not measured": family.name,
            "workers": str(one.workers),
            f"{report.unit}/s": f"{number(one.rate)} ({number(one.low)} to {number(one.high)})",
            "in the exchange": f"{100 * one.share_reduce:.0f} %",
            "note": one.note,
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
            words = family.link.to_json()
            gbit, micro = words["bandwidth_gbit"]["value"], words["latency_us"]["value"]
            miss = "" if family.worst_miss is None else (
                f"; at the measured counts the model was off by up to {100 * family.worst_miss:.0f} %, "
                "and the intervals are widened by that"
            )  # fmt: skip
            link = f"{number(gbit)} Gbit/s and {number(micro)} us ({words['source']})"
            found.append(f"{family.name}: from {family.base}, {link}{miss}.")
    return found


def machine(report: CompareReport) -> str:
    """One line on machine and versions."""
    e = report.meta["environment"]
    gpus = f", {len(e['gpus'])} x {e['gpus'][0]}" if e["gpus"] else ", no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    return (
        f"{e['cpu']}, {e['cores']} cores ({e['cpu_capability']}), {e['memory_bytes'] / 1e9:.0f} GB{gpus}; "
        f"{e['system']}; Python {e['python']}, {versions}"
    )


def markdown(report: CompareReport) -> str:
    """The whole report for a paper or a README."""
    parts = [f"# {report.comparison.id}", machine(report), "## Speed", pipe(speed(report))]
    parts += ["## Time", pipe(time_and_cost(report)), "## Results", pipe(results(report))]
    parts += ["\n".join(f"- {g.sentence()}" for g in report.groups)]
    laws = [f"- {sentence}" for family in report.families for sentence in fits(family)]
    parts += ["## Laws and forecasts", "\n".join([*laws, *(f"- {line}" for line in links(report))])]
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
