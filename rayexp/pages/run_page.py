"""`rayexp report` of a run: one offline page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayexp.display import figure, seconds
from rayexp.errors import UserError
from rayexp.pages import plots
from rayexp.pages.judgements import judgements_of
from rayexp.pages.language import LanguageSample
from rayexp.pages.page import render, save
from rayexp.runs.records import PHASES, EpochRecord, read_lines, step_line
from rayexp.runs.records import best as best_of
from rayexp.runs.residency import residency_of, steps_of
from rayexp.runs.run import Run


def write_run_page(path: Path, run: Run, sample: LanguageSample | None = None) -> None:
    """Write the page of a run (UserError where `path` is a folder or no epoch has finished).

    Args:
        sample: of a language model's best epoch.
    """
    records = run.records()
    if not records:
        raise UserError(f"{run.id}: no epoch has finished, so there is nothing to report (status {run.status()})")
    save(path, run_page(run, records, diff_pages(run, path), sample), within=run.root)


def run_page(
    run: Run, records: list[EpochRecord], diffs: list[tuple[str, str]], sample: LanguageSample | None = None
) -> str:
    """The page as HTML; `diffs` are (link, words)."""
    meta = run.meta()
    unit = run.unit()
    found = dict.fromkeys(name for record in records for name in record.metrics)
    metrics = [*(name for name in run.goals() if name in found), *(name for name in found if name not in run.goals())]
    best = best_of(records, run.goals())
    judgements, why_none = None, ""
    if run.kind() == "images":
        try:
            judgements = judgements_of(run, (best or records[-1]).epoch)
        except UserError as error:
            why_none = str(error)
    loss = "loss" if run.kind() == "samples" else plots.NATS  # of a workload of the user's own it may be anything
    steps = plots.step_curves(records, _steps(run), unit, loss)
    return render(
        "report_run.html.j2",
        run=run,
        meta=meta,
        status=run.status(),
        lead=lead(records, best),
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
        curves=plots.curves(records, metrics, loss),
        steps=steps,
        pace="" if steps else plots.pace(records, unit),
        bars=plots.run_phases(records),
        config=run.config_path.read_text(encoding="utf-8"),
        gpu=on_gpu(meta, records),
        diffs=diffs,
        judgements=judgements,
        why_none=why_none,
        heat_map=plots.heat_map(judgements.matrix, judgements.names) if judgements and not judgements.few else "",
        sample=sample,
    )


def lead(records: list[EpochRecord], best: EpochRecord | None) -> str:
    """What came of the run, in two sentences: its best epoch, and what followed it."""
    last = records[-1]
    if best is None:
        return f"No epoch of {len(records)} has a finite validation loss, so there is no best one."
    metrics = [
        f"{name} {figure(value)}{' %' if name.startswith('acc') else ''}" for name, value in best.metrics.items()
    ]
    found = f"Epoch {best.epoch} is the best: {', '.join([*metrics, f'validation loss {figure(best.val_loss)}'])}."
    if len(records) == 1:
        return found
    if best is last:
        return f"{found} It is also the last: more epochs may be better still."
    if not last.finite:
        return f"{found} The last epoch ({last.epoch}) is not finite."
    if last.train_loss < best.train_loss and last.val_loss > best.val_loss:
        fell = f"the training loss fell from {figure(best.train_loss)} to {figure(last.train_loss)}"
        rose = f"the validation loss rose from {figure(best.val_loss)} to {figure(last.val_loss)}"
        return f"{found} From there to epoch {last.epoch} {fell} and {rose}, a sign of overfitting."
    return f"{found} No later epoch is better, up to the last ({last.epoch})."


def on_gpu(meta: Mapping[str, Any], records: list[EpochRecord]) -> str:
    """How a GPU was used, and the most memory that PyTorch took of it; empty on a CPU."""
    peak = max((record.peak_memory.get("device", 0) for record in records), default=0)
    told = {
        "replicas": str(meta.get("lanes") or "") if steps_of(meta) else "",
        "steps": steps_of(meta),
        "samples": residency_of(meta) or "",
        "peak memory": f"{peak / 1e9:.2f} GB" if peak else "",
    }
    found = "; ".join(f"{name}: {value}" for name, value in told.items() if value)
    return f"On the GPU: {found}" if found else ""


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
