"""Which judgements changed, and how: the one rule for all that counts, lists or draws changes.

Where a model's output is not finite there is no judgement. It is equal to nothing, not even to another such output, and
its sample is `not_finite`, whatever the other side says: never gained, never lost, never unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayexp.runs.records import Predictions

KINDS = ("not_finite", "lost", "other_wrong", "gained")
"""Kinds of changed judgements, the worst first. `other_wrong` occurs where there are labels."""
UNCHANGED = len(KINDS)  # the code of a sample that both judge alike
FACTOR = math.log(2)  # nats by which a token's loss must move to count: its probability doubles or halves
SHARE = 0.1  # of the median loss: how much a sample's loss must move to count, where nothing else is said


@dataclass(frozen=True, slots=True)
class Judgements:
    """What a checkpoint says of n samples, reduced to what decides whether another says the same.

    Attributes:
        said: float[n], the predicted class where there are labels, else the loss. NaN where the output is not finite.
        label: float[n], the true class; None where the loss decides.
        tolerance: by how much a loss must move to count.
    """

    said: NDArray[np.floating]
    label: NDArray[np.floating] | None
    tolerance: float

    @classmethod
    def of(cls, p: Predictions, tolerance: float = FACTOR) -> Judgements:
        """The judgements in stored predictions.

        Args:
            p: of n samples.
            tolerance: where the loss decides, in its unit.
        """
        if p.kind != "images":
            return cls(np.where(p.finite, p["loss"], np.nan), None, tolerance)
        said = np.where(p.finite, p["top5"][:, 0], np.nan).astype(np.float32)
        return cls(said, p["label"].astype(np.float32), 0.0)

    def rise(self, later: Judgements) -> NDArray[np.float64]:
        """float64[n]: by how much `said` rose (of losses: B's minus A's); NaN where a side is not finite."""
        return later.said.astype(np.float64) - self.said.astype(np.float64)

    def changes(self, later: Judgements) -> NDArray[np.int8]:
        """int8[n]: what became of each judgement, as a position in KINDS, or UNCHANGED."""
        rise = self.rise(later)
        broken = np.isnan(rise)
        if self.label is None:
            lost, gained, other = rise > self.tolerance, rise < -self.tolerance, np.zeros_like(broken)
        else:
            was, now = self.said == self.label, later.said == self.label
            lost, gained, other = was & ~now, ~was & now, rise != 0
        return np.select([broken, lost, gained, other], [0, 1, 3, 2], UNCHANGED).astype(np.int8)


def worst_first(a: Judgements, b: Judgements, limit: int | None) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """The positions of the changed samples and their kinds: not finite first, then by how much the loss rose. With a
    limit, of those that are not finite and those that moved most, so many."""
    changes, rise = a.changes(b), np.nan_to_num(a.rise(b), nan=math.inf)
    moved = np.flatnonzero(changes != UNCHANGED)
    if limit is not None and len(moved) > limit:
        moved = moved[np.argsort(-np.abs(rise[moved]), kind="stable")[:limit]]
    moved = moved[np.lexsort((moved, -rise[moved]))]
    return moved, changes[moved]


def tally(changes: NDArray[np.int8]) -> Mapping[str, int]:
    """How many samples of each kind."""
    return dict(zip(KINDS, np.bincount(changes, minlength=len(KINDS)).tolist(), strict=False))


def default_tolerance(p: Predictions, q: Predictions) -> float:
    """By how much a loss must move to count between two checkpoints: tokens, a factor of two of the probability;
    samples, a tenth of the median absolute loss of both together; images, where classes decide, 0."""
    if p.kind == "images":
        return 0.0
    if p.kind == "tokens":
        return FACTOR
    losses = np.concatenate([x["loss"][x.finite] for x in (p, q)]).astype(np.float64)
    return SHARE * float(np.median(np.abs(losses))) if len(losses) else 0.0


def churn(p: Predictions, q: Predictions, tolerance: float | None = None) -> int:
    """How many samples are judged differently.

    Args:
        p, q: of the same samples.
        tolerance: as for `Judgements.of`; None: the default one.
    """
    tolerance = default_tolerance(p, q) if tolerance is None else tolerance
    changes = Judgements.of(p, tolerance).changes(Judgements.of(q, tolerance))
    return int(np.count_nonzero(changes != UNCHANGED))
