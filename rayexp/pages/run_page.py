"""`rayexp report` of a run: one offline page."""

from __future__ import annotations

import math
from pathlib import Path

from rayexp.display import seconds
from rayexp.errors import UserError
from rayexp.pages import plots
from rayexp.pages.page import render, save
from rayexp.runs.records import PHASES, EpochRecord
from rayexp.runs.run import Run


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
        seconds=seconds,
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
