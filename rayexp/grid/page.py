"""`rayexp report` of a comparison: one offline page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayexp.errors import UserError
from rayexp.grid import plots, tables
from rayexp.grid.report import CompareReport
from rayexp.pages.page import render, save


def write_compare_page(path: Path, report: CompareReport) -> None:
    """Write the page of a comparison (UserError where `path` is a folder or nothing was measured)."""
    if not report.cells:
        reasons = "; ".join(f"{cell}, repeat {repeat}: {error}" for cell, repeat, error in report.failed[:3])
        raise UserError(f"{report.comparison.id}: no cell has been measured yet{f' ({reasons})' if reasons else ''}")
    save(path, compare_page(report))


def compare_page(report: CompareReport) -> str:
    """The page as HTML."""
    kinds = list(dict.fromkeys(entry.cell.kind for entry in report.cells))
    speedups = [(kind, plots.speedup(report, kind)) for kind in kinds]
    repeats = [repeat for entry in report.cells for repeat in entry.measured.repeats]
    return render(
        "report_compare.html.j2",
        r=report,
        answers=answers(report),
        machine=tables.machine(report),
        speed=_table(tables.speed(report)),
        time=_table(tables.time_and_cost(report)),
        results=_table(tables.results(report)),
        forecasts=_table(tables.forecasts(report)),
        laws=[sentence for family in report.families for sentence in tables.fits(family)],
        links=tables.links(report),
        rates=[(kind, plots.rates(report, kind)) for kind in kinds],
        speedups=[(kind, plot) for kind, plot in speedups if plot],
        phases=[(kind, plots.phases(report, kind)) for kind in kinds],
        losses=plots.losses(report),
        off=max(repeat.unaccounted() for repeat in repeats),
        base=report.comparison.base(),
        overrides=report.config.overrides,
    )


def answers(report: CompareReport) -> list[str]:
    """The report in a few sentences."""
    found = []
    fastest = max(report.cells, key=lambda entry: entry.rate.value)
    slowest = min(report.cells, key=lambda entry: entry.rate.value)
    if fastest is not slowest:
        ratio = fastest.rate.over(slowest.rate)
        found.append(
            f"{fastest.cell.id} is the fastest: {tables.number(fastest.rate.value)} {report.unit} per second, "
            f"{tables.between(ratio)} times {slowest.cell.id}."
        )
    for reference in dict.fromkeys(entry.reference for entry in report.cells if entry.reference):
        scaled = [entry for entry in report.cells if entry.reference == reference and entry.cell.workers]
        largest = max(scaled, key=lambda entry: entry.cell.devices, default=None)
        if largest is not None and largest.cell.id != reference:
            found.append(
                f"{largest.cell.id} on {tables.devices(largest)}: {tables.between(largest.speedup)} times {reference}."
            )
    gpus = [entry for entry in report.cells if entry.cell.kind == "gpu"]
    cpus = [entry for entry in report.cells if entry.cell.kind == "cpu"]
    if gpus and cpus:
        cpu = max(cpus, key=lambda entry: entry.rate.value)
        fewest = min(entry.cell.devices for entry in gpus)
        one = max((entry for entry in gpus if entry.cell.devices == fewest), key=lambda entry: entry.rate.value)
        most = max(gpus, key=lambda entry: entry.rate.value)
        found += [
            f"{gpu.cell.id} on {tables.devices(gpu)}: {tables.between(gpu.rate.over(cpu.rate))} times {cpu.cell.id}, "
            "the fastest without a GPU."
            for gpu in ([one] if one is most else [one, most])
        ]
    exact = [entry.over_ddp for entry in report.cells if entry.over_ddp is not None]
    if exact:
        low, high = min(e.value for e in exact), max(e.value for e in exact)
        span = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
        found.append(f"Exact runs at {span} times the rate of ddp in the same place.")
    found += [group.sentence() + "." for group in report.groups]
    return found


def _table(rows: list[dict[str, str]]) -> dict[str, Any]:
    names = tables.filled(rows)
    # Numbers stand right; a column is one where its filled cells begin with a digit.
    right = [all(row[n][:1].isdigit() for row in rows if row[n]) and n not in ("weights", "on") for n in names]
    return {"names": names, "rows": [[row[n] for n in names] for row in rows], "right": right}
