"""What became of some of the samples from one checkpoint to another, in one row: for slices and for tables of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.diff.changes import Judgements, tally
from rayexp.diff.documents import documents, perplexity, sign_flip
from rayexp.diff.pair import Checkpoint, top1
from rayexp.diff.samples import paired
from rayexp.diff.statistics import adjust, difference_interval, mcnemar
from rayexp.diff.text import vocabulary_of

MEASURES = {"images": "acc1", "tokens": "ppl", "samples": "loss"}
UNITS = {"images": "points", "tokens": "%", "samples": ""}
TESTS = {
    "images": "exact McNemar",
    "tokens": "sign flips of documents",
    "samples": "Wilcoxon's signed ranks",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """n samples, judged by A and by B.

    Attributes:
        a, b: acc1 in percent, perplexity, or the mean loss (MEASURES).
        gained, lost, other_wrong, not_finite: changed judgements by kind.
        difference: B - A, in points of acc1, in percent of A's perplexity, or in units of the loss.
        interval: of the difference; None where a loss is not finite or there is too little.
        p: of the paired test; None likewise.
        adjusted_p: among all outcomes of one table (see `adjusted`).
    """

    n: int
    a: float
    b: float
    gained: int
    lost: int
    other_wrong: int
    not_finite: int
    difference: float
    interval: tuple[float, float] | None
    p: float | None
    adjusted_p: float | None = None

    @property
    def churn(self) -> int:
        """Judgements that changed."""
        return self.gained + self.lost + self.other_wrong + self.not_finite

    def to_json(self, kind: str) -> dict[str, Any]:
        """The fields, with the measure under its name; `interval` beside `difference`."""
        tail = ("gained", "lost", "other_wrong", "not_finite", "difference", "interval", "p", "adjusted_p")
        rest = {name: getattr(self, name) for name in tail if name != "other_wrong" or kind == "images"}
        return {"n": self.n, MEASURES[kind]: {"a": self.a, "b": self.b}, "churn": self.churn, **rest}


def outcome(a: Checkpoint, b: Checkpoint, rows: NDArray[np.bool_] | None = None, tolerance: float = 0.0) -> Outcome:
    """What became of the samples of `rows`, or of all.

    Args:
        a, b: of the same data (`pair.check`).
        rows: bool[n], at least one; of tokens whole documents, because inference is by these.
        tolerance: by how much a loss of kind `samples` must move to count.

    Raises:
        UserError: the vocabularies differ.
    """
    p, q = a.predictions, b.predictions
    keep = np.ones(len(p), dtype=bool) if rows is None else rows
    if p.kind == "tokens":
        changes = Judgements.of(p).changes(Judgements.of(q))
    else:
        changes = Judgements.of(p, tolerance).changes(Judgements.of(q, tolerance))
    counts = dict(tally(changes[keep]))
    if p.kind == "images":
        return _of_images(a, b, keep, counts)
    losses = np.stack([x["loss"].astype(np.float64) for x in (p, q)])
    if p.kind == "tokens":
        document, count, _ = documents(p["token"], p["offset"], vocabulary_of(a, b))
        return _of_tokens(losses[:, keep], document[keep], count, counts)
    with np.errstate(invalid="ignore"):  # inf - inf
        change = (losses[1] - losses[0])[keep]
    interval, p_value = (None, None) if counts["not_finite"] else paired(change)
    first, second = (float(x) for x in losses[:, keep].mean(1))
    return Outcome(len(change), first, second, **counts, difference=float(change.mean()), interval=interval, p=p_value)


def _of_images(a: Checkpoint, b: Checkpoint, keep: NDArray[np.bool_], counts: dict[str, int]) -> Outcome:
    right_a, right_b = (
        (top1(side.predictions) == side.predictions["label"])[keep] for side in (a, b)
    )  # what is not finite is wrong
    n, gained, lost = len(right_a), int((~right_a & right_b).sum()), int((right_a & ~right_b).sum())
    low, high = difference_interval(gained, lost, n)
    return Outcome(
        n,
        100 * float(right_a.mean()),
        100 * float(right_b.mean()),
        **counts,
        difference=100 * (gained - lost) / n,
        interval=(100 * low, 100 * high),
        p=float(mcnemar(gained, lost)),
    )


def _of_tokens(losses: NDArray[np.float64], document: NDArray[np.int64], count: int, counts: dict[str, int]) -> Outcome:
    """Losses float64[2, n] of tokens in these documents; a document without tokens here does not count."""
    size = np.bincount(document, minlength=count)
    with np.errstate(invalid="ignore"):  # inf - inf
        change = losses[1] - losses[0]
    sums = np.bincount(document, weights=change, minlength=count)[size > 0].astype(np.float64)
    p_value, interval = None, None
    if len(sums) >= 2 and not counts["not_finite"]:
        p_value, found = sign_flip(sums, size[size > 0])
        interval = found and (100 * (perplexity(found[0]) - 1), 100 * (perplexity(found[1]) - 1))
    return Outcome(
        losses.shape[1],
        perplexity(losses[0].mean()),
        perplexity(losses[1].mean()),
        **counts,
        difference=100 * (perplexity(change.mean()) - 1),
        interval=interval,
        p=p_value,
    )


def adjusted(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The same with p adjusted for their number (Benjamini-Hochberg, as for classes); those without a test are none of
    these."""
    tested = {i: o.p for i, o in enumerate(outcomes) if o.p is not None}
    found = dict(zip(tested, adjust(list(tested.values())).tolist(), strict=True))
    return [replace(o, adjusted_p=found.get(i)) for i, o in enumerate(outcomes)]
