"""The page of `rayexp diff --all RUN --html`: the churn matrix as a heat map, and the epochs as curves."""

from __future__ import annotations

from pathlib import Path

from rayexp.diff.churn import ChurnReport
from rayexp.pages.page import render, save

WIDTH, HEIGHT = 560.0, 220.0  # of the curves' plot
READABLE = 26  # epochs up to which the cells carry their numbers
CURVES = (("settled", "settled for good"), ("to_last", "unlike the last epoch"), ("changed", "changed in this epoch"))


def write_churn_page(path: Path, report: ChurnReport) -> None:
    """Write the page (UserError where `path` is a folder)."""
    save(path, churn_page(report))


def churn_page(report: ChurnReport) -> str:
    """The page as HTML."""
    count = len(report.sampled)
    top = float(report.matrix.max()) or 1.0
    size = 26 if count <= READABLE else max(3.0, 676 / count)
    return render(
        "diff_churn.html.j2",
        r=report,
        rows=list(zip(report.sampled, report.matrix.tolist(), strict=True)),
        top=top,
        size=size,
        marks=[(i, report.sampled[i]) for i in _marks(count)],
        numbers=count <= READABLE,
        curves=[(name, words, _points(report, name)) for name, words in CURVES],
        ticks=_ticks(report),
        broken=any(e.not_finite for e in report.epochs),
        width=WIDTH,
        height=HEIGHT,
    )


def _ticks(report: ChurnReport) -> list[tuple[float, int]]:
    """Where the curves' plot is labelled with an epoch; numbers of four digits need twice the room."""
    count = len(report.epochs)
    return [(round(_x(i, count), 1), report.epochs[i].epoch) for i in _marks(count, 12 if count < 1000 else 8)]


def _marks(count: int, labels: int = 12) -> list[int]:
    """About so many of `count` positions, to be labelled."""
    every = max(1, round(count / labels))
    return [i for i in range(count) if i % every == 0 or (i == count - 1 and i % every > every // 2)]


def _x(i: int, count: int) -> float:
    return WIDTH * i / max(1, count - 1)


def _points(report: ChurnReport, name: str) -> list[tuple[float, float]]:
    count = len(report.epochs)
    values = [(i, getattr(e, name)) for i, e in enumerate(report.epochs)]
    if name == "settled":
        del values[-1]  # it is what the others are settled against
    return [(round(_x(i, count), 1), round(HEIGHT * (1 - v / 100), 1)) for i, v in values if v is not None]
