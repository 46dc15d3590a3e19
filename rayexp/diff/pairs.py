"""More than two checkpoints: every two of them compared, with p adjusted for the number of pairs."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayexp.diff.changes import KINDS, default_tolerance
from rayexp.diff.documents import perplexity
from rayexp.diff.noise import measure_of
from rayexp.diff.outcome import MEASURES, Outcome, adjusted, outcome
from rayexp.diff.pair import Checkpoint, check
from rayexp.display import plain
from rayexp.errors import UserError


@dataclass(frozen=True, slots=True)
class Pair:
    """The outcome from checkpoint number `a` to number `b`, both from 0."""

    a: int
    b: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class PairsReport:
    """Three or more checkpoints on the same n samples.

    Attributes:
        measures: of each checkpoint: acc1 in percent, perplexity, or the mean loss.
        not_finite: samples of each checkpoint without a finite output.
        tolerance: by how much a loss of kind `samples` must move to count.
        pairs: every two, in the order in which they were given.
    """

    kind: str
    n: int
    checkpoints: tuple[Checkpoint, ...]
    measures: tuple[float, ...]
    not_finite: tuple[int, ...]
    tolerance: float
    pairs: tuple[Pair, ...]

    @property
    def changed(self) -> int:
        """Pairs that differ by more than chance."""
        return sum(p.outcome.adjusted_p is not None and p.outcome.adjusted_p < 0.05 for p in self.pairs)

    def letter(self, number: int) -> str:
        """`A` of 0, `Z` of 25, `27` of 26."""
        return chr(ord("A") + number) if number < 26 else str(number + 1)

    def churn_matrix(self) -> list[list[float]]:
        """Percent of the samples that every two judge differently; 0 on the diagonal."""
        count = len(self.checkpoints)
        matrix = np.zeros((count, count))
        for p in self.pairs:
            matrix[p.a, p.b] = matrix[p.b, p.a] = 100 * p.outcome.churn / self.n
        rows: list[list[float]] = matrix.tolist()
        return rows

    def to_json(self) -> dict[str, Any]:
        """The checkpoints, and each pair with its outcome and the numbers (from 0) of its two."""
        return dict(
            plain(
                {
                    "kind": self.kind,
                    "n": self.n,
                    "measure": MEASURES[self.kind],
                    "tolerance": self.tolerance,
                    "checkpoints": [
                        {**c.to_json(), "not_finite": broken}
                        for c, broken in zip(self.checkpoints, self.not_finite, strict=True)
                    ],
                    "correction": "Benjamini-Hochberg",
                    "pairs": [{"a": p.a, "b": p.b, **p.outcome.to_json(self.kind)} for p in self.pairs],
                }
            )
        )

    def to_csv(self) -> str:
        """A line for each pair."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        measure = MEASURES[self.kind]
        kinds = [kind for kind in KINDS if kind != "other_wrong" or self.kind == "images"]
        head = ("a", "b", "n", f"a_{measure}", f"b_{measure}", "difference", "low", "high", "p", "adjusted_p", "churn")
        writer.writerow((*head, *kinds))
        for p in self.pairs:
            o = p.outcome
            low, high = o.interval or ("", "")
            test = ("" if x is None else x for x in (o.p, o.adjusted_p))
            names = self.checkpoints[p.a].name, self.checkpoints[p.b].name
            counts = (getattr(o, kind) for kind in kinds)
            writer.writerow((*names, o.n, o.a, o.b, o.difference, low, high, *test, o.churn, *counts))
        return out.getvalue()


def diff_pairs(checkpoints: Sequence[Checkpoint], tolerance: float | None = None) -> PairsReport:
    """Compare every two of three or more checkpoints.

    Args:
        tolerance: by how much a loss of kind `samples` must move to count; None: a tenth of the median of two.

    Raises:
        UserError: they are not of the same data, or one is named twice.
    """
    first = checkpoints[0]
    names = [c.name for c in checkpoints]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} is named twice; a table of pairs takes each checkpoint once")
    for c in checkpoints[1:]:
        check(first, c)
        for column in ("label", "token"):
            if column in first.predictions.arrays and not np.array_equal(
                first.predictions[column], c.predictions[column]
            ):
                raise UserError(f"{first.name} and {c.name} disagree on the {column}s of the same data; one is damaged")
    if tolerance is None:
        tolerance = default_tolerance(first.predictions, checkpoints[1].predictions)
    places = list(itertools.combinations(range(len(checkpoints)), 2))
    outcomes = adjusted([outcome(checkpoints[i], checkpoints[j], None, tolerance) for i, j in places])
    measures = [measure_of(c.predictions) for c in checkpoints]
    return PairsReport(
        kind=first.predictions.kind,
        n=len(first.predictions),
        checkpoints=tuple(checkpoints),
        measures=tuple(perplexity(x) if first.predictions.kind == "tokens" else x for x in measures),
        not_finite=tuple(int((~c.predictions.finite).sum()) for c in checkpoints),
        tolerance=tolerance,
        pairs=tuple(Pair(i, j, o) for (i, j), o in zip(places, outcomes, strict=True)),
    )
