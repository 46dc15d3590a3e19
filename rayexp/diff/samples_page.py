"""The page of `rayexp diff A B --html` for other workloads: summary, losses against each other, and the list."""

from __future__ import annotations

import numpy as np

from rayexp.diff.changes import KINDS, UNCHANGED, Judgements
from rayexp.diff.pair import config_changes
from rayexp.diff.samples import SamplesReport
from rayexp.display import figure
from rayexp.pages.page import render
from rayexp.pages.plots import interval_plot

LISTED = 500  # rows of the page's list
DOTS = 4000  # of the scatter; of more samples, evenly spread ones
REACH = 99.0  # percentile of the losses that the scatter's axes end at


def samples_page(report: SamplesReport) -> str:
    """The page as HTML."""
    # Drawn as a fall or rise of the loss; no bound, which is of another measure.
    drawn = interval_plot(report.difference, report.interval, None) if report.interval else None
    dots, axis = _dots(report)
    return render(
        "diff_samples.html.j2",
        r=report,
        lead=lead(report),
        changes=config_changes(report.a, report.b),
        interval=drawn,
        shares=_shares(report),
        dots=dots,
        axis=axis,
        listed=report.flips[:LISTED],
    )


def lead(r: SamplesReport) -> str:
    """Which of the two is better, if either, in a sentence."""
    if r.equal:
        return f"A and B say the same of every one of the {r.unit} (mean loss {figure(r.loss[0])})."
    if r.broken:
        return f"{r.broken:,} of the {r.n:,} {r.unit} have no finite loss, so neither can be called better."
    loss = f"mean loss {figure(r.loss[0])} → {figure(r.loss[1])}"
    if r.interval is None:
        return f"There are too few {r.unit} to tell which is better ({loss})."
    low, high = r.interval
    span = f"{r.difference:+.3g}, 95 % interval {low:+.3g} to {high:+.3g}"
    if low <= 0 <= high:
        return f"Neither is shown to be better: {loss} ({span}), which chance alone may do."
    return f"{'A' if low > 0 else 'B'} is better: {loss} ({span}), more than chance explains."


def _shares(r: SamplesReport) -> list[tuple[str, str, int, float]]:
    """Class, words, count and percent of the parts of the validation data."""
    parts = [
        ("broken", "not finite", r.broken),
        ("gained", "gained: the loss fell", r.gained),
        ("same-wrong", "within the tolerance", r.n - r.churn),
        ("lost", "lost: the loss rose", r.lost),
    ]
    return [(css, words, count, 100 * count / r.n) for css, words, count in parts if count or css != "broken"]


def _dots(r: SamplesReport) -> tuple[dict[str, str], float]:
    """One SVG path of zero-length strokes per kind, in a square of 400: x is A's loss, y is B's, upwards; and the loss
    at which both axes end. Larger ones lie on the edge."""
    p, q = r.a.predictions, r.b.predictions
    kinds = Judgements.of(p, r.tolerance).changes(Judgements.of(q, r.tolerance))
    drawn = np.flatnonzero(p.finite & q.finite)
    if not len(drawn):
        return {}, 0.0
    if len(drawn) > DOTS:
        drawn = drawn[np.linspace(0, len(drawn) - 1, DOTS).astype(int)]
    x, y = p["loss"][drawn].astype(np.float64), q["loss"][drawn].astype(np.float64)
    axis = float(np.percentile(np.concatenate([x, y]), REACH)) or 1.0
    names = {UNCHANGED: "same", **dict(enumerate(KINDS))}
    paths: dict[str, list[str]] = {name: [] for name in names.values()}
    for kind, a, b in zip(kinds[drawn].tolist(), x / axis, y / axis, strict=True):
        left, up = (400 * min(1.0, max(0.0, float(v))) for v in (a, b))
        paths[names[kind]].append(f"M{left:.0f} {400 - up:.0f}h0")
    return {name: "".join(dict.fromkeys(path)) for name, path in paths.items()}, axis
