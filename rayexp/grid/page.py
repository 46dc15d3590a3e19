"""`rayexp report` of a comparison: one offline page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rayexp.errors import UserError
from rayexp.grid import plots, sentences, tables
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
    repeats = [repeat for entry in report.cells for repeat in entry.measured.repeats]
    titles = dict(sentences.sections(report))
    return render(
        "report_compare.html.j2",
        r=report,
        answers=list(sentences.answers(report)),
        machine=sentences.machine(report),
        speed=_table(tables.speed(report)),
        scalings=[
            (mode, title, _table(titles[title]), _plots(plots.speedup, report, kinds, mode))
            for mode, title in sentences.SCALINGS.items()
            if title in titles
        ],
        time=_table(tables.time_and_cost(report)),
        communication=_table(tables.communication(report)),
        results=_table(tables.results(report)),
        forecasts=_table(tables.forecasts(report)),
        laws=sentences.laws(report),
        links=sentences.links(report),
        rates=[(kind, plots.rates(report, kind)) for kind in kinds],
        batches=plots.batches(report),
        phases=[(kind, plots.phases(report, kind)) for kind in kinds],
        curves=plots.over_time(report),
        off=max(repeat.unaccounted() for repeat in repeats),
        base=report.comparison.base(),
        overrides=report.config.overrides,
        kind=repeats[0].run.kind(),
    )


def _plots(
    make: Callable[[CompareReport, str, str], str | None], report: CompareReport, kinds: Sequence[str], mode: str
) -> list[tuple[str, str]]:
    """The figure of each kind of device that has one."""
    made = [(kind, make(report, kind, mode)) for kind in kinds]
    return [(kind, figure) for kind, figure in made if figure]


def _table(rows: list[dict[str, str]]) -> dict[str, Any]:
    names = tables.filled(rows)
    # Numbers stand right; a column is one where its filled cells begin with a digit.
    right = [all(row[n][:1].isdigit() for row in rows if row[n]) and n not in ("weights", "on") for n in names]
    return {"names": names, "rows": [[row[n] for n in names] for row in rows], "right": right}
