"""`rayexp report` of a run: one offline page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rayexp.display import seconds
from rayexp.errors import UserError
from rayexp.pages import plots
from rayexp.pages.judgements import judgements_of
from rayexp.pages.language import LanguageSample
from rayexp.pages.page import render, save
from rayexp.runs.records import PHASES, EpochRecord, read_lines, step_line
from rayexp.runs.records import best as best_of
from rayexp.runs.run import Run


def write_run_page(path: Path, run: Run, sample: LanguageSample | None = None) -> None:
    """Write the page of a run (UserError where `path` is a folder or no epoch has finished).

    Args:
        sample: of a language model's best epoch.
    """
    records = run.records()
    if not records:
        raise UserError(f"{run.id}: no epoch has finished, so there is nothing to report (status {run.status()})")
    save(path, run_page(run, records, diff_pages(run, path), sample))


def run_page(
    run: Run, records: list[EpochRecord], diffs: list[tuple[str, str]], sample: LanguageSample | None = None
) -> str:
    """The page as HTML; `diffs` are (link, words)."""
    meta = run.meta()
    unit = run.unit()
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    best = best_of(records, run.goals())
    judgements, why_none = None, ""
    if run.kind() == "images":
        try:
            judgements = judgements_of(run, (best or records[-1]).epoch)
        except UserError as error:
            why_none = str(error)
    steps = plots.step_curves(records, _steps(run))
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
        kind=run.kind(),
        seconds=seconds,
        phases=[p for p in PHASES if any(r.seconds.get(p, 0.0) > 0 for r in records)],
        total=sum(r.seconds.get("total", 0.0) for r in records),
        startup=(meta.get("startup_seconds") or {}).get("to_first_step"),
        curves=plots.curves(records),
        steps=steps,
        pace=plots.pace(records, unit, with_lr=not steps),
        bars=plots.run_phases(records),
        config=run.config_path.read_text(encoding="utf-8"),
        diffs=diffs,
        judgements=judgements,
        why_none=why_none,
        heat_map=plots.heat_map(judgements.matrix) if judgements and not judgements.few else "",
        sample=sample,
    )


def _steps(run: Run) -> list[dict[str, Any]]:
    """The lines of steps.jsonl; without those that are damaged."""
    try:
        return read_lines(run.steps_path, step_line, [])
    except UserError:  # it cannot be read
        return []


def diff_pages(run: Run, out: Path) -> list[tuple[str, str]]:
    """Pages of `rayexp diff --html` in the run directory or beside the report: link and name."""
    import os

    here = out.resolve().parent
    found = {page.resolve() for folder in (run.root, here) if folder.is_dir() for page in folder.glob("*diff*.html")}
    found.discard(out.resolve())
    return [(os.path.relpath(page, here), page.name) for page in sorted(found)]
