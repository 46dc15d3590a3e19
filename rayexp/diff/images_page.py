"""The page of `rayexp diff A B --html` for images: summary, classes, and a gallery of the changed judgements."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayexp.diff.changes import KINDS
from rayexp.diff.images_report import STATES, ImagesReport
from rayexp.diff.pair import config_changes
from rayexp.diff.statistics import LEVEL
from rayexp.display import printable
from rayexp.errors import UserError
from rayexp.pages.page import p_value, render
from rayexp.pages.pictures import read_pictures
from rayexp.pages.plots import interval_plot

MAX_PICTURES = 6_000  # about 10 MB of page; where there are more flips, lost and gained go first


def image_page(report: ImagesReport) -> str:
    """The page as HTML."""
    pictures, why_not = thumbnails(report)
    return render(
        "diff_images.html.j2",
        r=report,
        lead=lead(report),
        checkpoints=[(side, c, acc1, acc5, loss) for side, c, acc1, acc5, loss in _sides(report)],
        changes=config_changes(report.a, report.b),
        states=[(words.replace("_", " "), row) for words, row in zip(STATES, report.table, strict=True)],
        shares=_shares(report),
        interval=interval_plot(report.difference, report.interval, report.max_drop),
        widest=max((max(c.lost, c.gained) for c in report.classes), default=1) or 1,
        changed_classes=sum(c.adjusted_p < 0.05 for c in report.classes),
        dots=_dots(report),
        gallery=_gallery(report),
        pictures=pictures,
        pictured=sum(map(bool, pictures)),
        why_not=why_not,
    )


def lead(r: ImagesReport) -> str:
    """Which of the two is better, if either, in a sentence."""
    if r.equal:
        return f"A and B say the same of every image (acc1 {r.acc1[0]:.2f} %)."
    acc1 = f"acc1 {r.acc1[0]:.2f} → {r.acc1[1]:.2f} %"
    span = f"{r.difference:+.2f} points, 95 % interval {r.interval[0]:+.2f} to {r.interval[1]:+.2f}"
    if r.mcnemar_p >= 1 - LEVEL:
        return (
            f"Neither is shown to be better: {acc1} ({span}), which chance alone may do (p = {p_value(r.mcnemar_p)})."
        )
    sign = "" if r.mcnemar_p < 1e-300 else "= "
    better = "B" if r.difference > 0 else "A"
    return f"{better} is better: {acc1} ({span}), more than chance explains (p {sign}{p_value(r.mcnemar_p)})."


def _sides(r: ImagesReport) -> Any:
    return zip("AB", (r.a, r.b), r.acc1, r.acc5, r.loss, strict=True)


def _shares(r: ImagesReport) -> list[tuple[str, str, int, float]]:
    """Class, words, count and percent of the parts of the validation data."""
    parts = [
        ("broken", "not finite", r.broken),
        ("same-right", "right in both", r.both_right),
        ("gained", "gained", r.gained),
        ("lost", "lost", r.lost),
        ("other", "wrong in another way", r.other_wrong),
        ("same-wrong", "wrong in the same way", r.both_wrong - r.other_wrong),
    ]
    return [(css, words, count, 100 * count / r.n) for css, words, count in parts if count or css != "broken"]


def _dots(r: ImagesReport) -> dict[str, str]:
    """One SVG path of zero-length strokes per kind, in a square of 400: x is A's confidence, y is B's, upwards."""
    paths: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for f in r.flips:
        if np.isfinite(f.confidence_a) and np.isfinite(f.confidence_b):
            paths[f.kind].append(f"M{400 * f.confidence_a:.0f} {400 - 400 * f.confidence_b:.0f}h0")
    return {kind: "".join(dict.fromkeys(path)) for kind, path in paths.items()}


def _gallery(r: ImagesReport) -> dict[str, Any]:
    """The flips by columns, for the page's script."""
    return {
        "words": [printable(r.words(i)) for i in range(len(r.class_names))],
        "kinds": list(KINDS),
        "name": [printable(f.name) for f in r.flips],
        "label": [f.label for f in r.flips],
        "kind": [KINDS.index(f.kind) for f in r.flips],
        "a": [f.a for f in r.flips],
        "b": [f.b for f in r.flips],
        "ca": [_percent(f.confidence_a) for f in r.flips],
        "cb": [_percent(f.confidence_b) for f in r.flips],
    }


def _percent(x: float) -> float | None:
    return round(100 * x, 1) if np.isfinite(x) else None


def thumbnails(r: ImagesReport) -> tuple[list[str], str]:
    """WebP pictures of the flips in base64, in the report's order (empty texts beyond MAX_PICTURES), and why there
    are none.

    They are read from the packed data that the runs' configurations name, if it is still what the checkpoints judged.
    """
    if not r.flips:
        return [], ""
    reasons = []
    for run in dict.fromkeys((r.a.run, r.b.run)):
        first = sorted(range(len(r.flips)), key=lambda i: r.flips[i].kind in ("not_finite", "other_wrong"))
        shown = sorted(first[:MAX_PICTURES])
        try:
            found = read_pictures(run, r.a.predictions.data_sha, [r.flips[i].index for i in shown])
        except UserError as error:
            reasons.append(str(error))
            continue
        encoded = dict(zip(shown, found, strict=True))
        return [encoded.get(i, "") for i in range(len(r.flips))], ""
    return [], reasons[0]
