"""`rayexp report`: one offline page about a comparison or about a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rayexp.analysis import compare_tables as tables
from rayexp.analysis import report_plots as plots
from rayexp.analysis.compare import CompareReport
from rayexp.analysis.html_page import render, save
from rayexp.errors import UserError
from rayexp.records import PHASES, EpochRecord
from rayexp.runs import Run


def write_compare_page(path: Path, report: CompareReport) -> None:
    """Write the page of a comparison (UserError where `path` is a folder or nothing was measured)."""
    if not report.lines:
        reasons = "; ".join(f"{cell}, repeat {repeat}: {error}" for cell, repeat, error in report.failed[:3])
        raise UserError(f"{report.comparison.id}: no cell has been measured yet{f' ({reasons})' if reasons else ''}")
    save(path, compare_page(report))


def compare_page(report: CompareReport) -> str:
    """The page as HTML."""
    kinds = list(dict.fromkeys(line.cell.kind for line in report.lines))
    speedups = [(kind, plots.speedup(report, kind)) for kind in kinds]
    repeats = [repeat for line in report.lines for repeat in line.measured.repeats]
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
    fastest = max(report.lines, key=lambda line: line.rate.value)
    slowest = min(report.lines, key=lambda line: line.rate.value)
    if fastest is not slowest:
        ratio = fastest.rate.over(slowest.rate)
        found.append(
            f"{fastest.cell.id} is the fastest: {tables.number(fastest.rate.value)} {report.unit} per second, "
            f"{tables.between(ratio)} times {slowest.cell.id}."
        )
    for reference in dict.fromkeys(line.reference for line in report.lines if line.reference):
        scaled = [line for line in report.lines if line.reference == reference and line.cell.workers]
        largest = max(scaled, key=lambda line: line.cell.devices, default=None)
        if largest is not None and largest.cell.id != reference:
            found.append(
                f"{largest.cell.id} on {tables.devices(largest)}: {tables.between(largest.speedup)} times {reference}."
            )
    gpus = [line for line in report.lines if line.cell.kind == "gpu"]
    cpus = [line for line in report.lines if line.cell.kind == "cpu"]
    if gpus and cpus:
        cpu = max(cpus, key=lambda line: line.rate.value)
        fewest = min(line.cell.devices for line in gpus)
        one = max((line for line in gpus if line.cell.devices == fewest), key=lambda line: line.rate.value)
        most = max(gpus, key=lambda line: line.rate.value)
        found += [
            f"{gpu.cell.id} on {tables.devices(gpu)}: {tables.between(gpu.rate.over(cpu.rate))} times {cpu.cell.id}, "
            "the fastest without a GPU."
            for gpu in ([one] if one is most else [one, most])
        ]
    exact = [line.over_ddp for line in report.lines if line.over_ddp is not None]
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


# ---------------------------------------------------------------------- one run


def write_run_page(path: Path, run: Run) -> None:
    """Write the page of a run (UserError where `path` is a folder or no epoch has finished)."""
    records = run.records()
    if not records:
        raise UserError(f"{run.id}: no epoch has finished, so there is nothing to report (status {run.status()})")
    save(path, run_page(run, records, diff_pages(run, path)))


def run_page(run: Run, records: list[EpochRecord], diffs: list[tuple[str, str]]) -> str:
    """The page as HTML; `diffs` are (link, words)."""
    meta = run.meta()
    unit = "tokens" if meta.get("workload") == "language_model" else "images"
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    try:
        best = next(r for r in records if r.epoch == run.best())
    except UserError:  # none is finite
        best = None
    return render(
        "report_run.html.j2",
        run=run,
        meta=meta,
        status=run.status(),
        records=records,
        metrics=metrics,
        best=best,
        nan=math.nan,
        unit=unit,
        seconds=tables.seconds,
        phases=[p for p in PHASES if any(r.seconds.get(p, 0.0) > 0 for r in records)],
        total=sum(r.seconds.get("total", 0.0) for r in records),
        startup=(meta.get("startup_seconds") or {}).get("to_first_step"),
        curves=plots.curves(records),
        pace=plots.pace(records, unit),
        bars=plots.run_phases(records),
        config=run.config_path.read_text(encoding="utf-8"),
        diffs=diffs,
        shas=len({r.weights_sha for r in records}),
    )


def diff_pages(run: Run, out: Path) -> list[tuple[str, str]]:
    """Pages of `rayexp diff --html` in the run directory or beside the report: link and name."""
    import os

    here = out.resolve().parent
    found = {page.resolve() for folder in (run.root, here) if folder.is_dir() for page in folder.glob("*diff*.html")}
    found.discard(out.resolve())
    return [(os.path.relpath(page, here), page.name) for page in sorted(found)]
