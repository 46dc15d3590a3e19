"""The page of `rayexp diff A B C ... --html`: every two checkpoints, as a heat map and as a table."""

from __future__ import annotations

from pathlib import Path

from rayexp.diff.outcome import MEASURES, TESTS, UNITS
from rayexp.diff.pairs import PairsReport
from rayexp.pages.page import render, save

SIZE = 52.0  # of a cell of the heat map


def write_pairs_page(path: Path, report: PairsReport) -> None:
    """Write the page (UserError where `path` is a folder)."""
    save(path, pairs_page(report))


def pairs_page(report: PairsReport) -> str:
    """The page as HTML."""
    matrix = report.churn_matrix()
    count = len(matrix)
    return render(
        "diff_pairs.html.j2",
        r=report,
        letters=[report.letter(i) for i in range(count)],
        matrix=matrix,
        top=max(map(max, matrix)) or 1.0,
        size=max(20.0, min(SIZE, 620 / count)),
        measure=MEASURES[report.kind],
        unit=UNITS[report.kind],
        test=TESTS[report.kind],
        moved=any(p.weights for p in report.pairs),
        broken=", ".join(f"{n:,} of {report.letter(i)}" for i, n in enumerate(report.not_finite) if n),
    )
