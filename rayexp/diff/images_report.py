"""What changed between two checkpoints on the same images: the report, as JSON and as CSV.

`kind` of a flip (the predictions differ): `lost` A right, B wrong; `gained` A wrong, B right; `other_wrong` both
wrong in different ways; `not_finite` A, B or both give no finite output, which is equal to nothing. churn = lost +
gained + other_wrong + not_finite (the rule: `changes`). In accuracies and in tests, which need a right or a wrong, a
sample that is not finite counts as wrong.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from rayexp.diff.pair_report import PairReport
from rayexp.diff.statistics import LEVEL, POWER, difference_interval
from rayexp.display import NOT_FINITE, csv_cell, plain

STATES = ("right", "wrong", "not_finite")  # of a side's judgement of an image


@dataclass(frozen=True, slots=True)
class Flip:
    """One image on which A and B disagree. Classes are label indices, None where a side's output is not finite; losses
    in nats."""

    index: int
    name: str
    label: int
    kind: str
    a: int | None
    b: int | None
    confidence_a: float
    confidence_b: float
    loss_a: float
    loss_b: float


@dataclass(frozen=True, slots=True)
class ClassChange:
    """One true class: n images, how many each side got right, what changed (those that are not finite in A or B are
    neither gained nor lost), exact McNemar p and its adjusted value (BH)."""

    label: int
    n: int
    right_a: int
    right_b: int
    gained: int
    lost: int
    not_finite: int
    p: float
    adjusted_p: float


@dataclass(frozen=True, slots=True)
class Move:
    """So many images of class `label` moved from prediction `a` to prediction `b`; None: not finite."""

    label: int
    a: int | None
    b: int | None
    count: int


@dataclass(frozen=True, slots=True)
class ImagesReport(PairReport):
    """What changed from A to B. Accuracies, `difference`, `interval` and `detectable` in percent and percentage points.

    `table[i][j]` are the images that are in state i of STATES by A and in state j by B; all other counts but
    `other_wrong` follow from it. `flips` are worst first: not_finite, lost, other_wrong, gained, each by how much the
    loss rose. `classes` are by the change in right answers, losses first. `confidence[kind]` is the median confidence
    of A and of B on those flips, of those that are finite.
    """

    class_names: tuple[tuple[str, str], ...]
    short: tuple[str, ...]
    acc1: tuple[float, float]
    acc5: tuple[float, float]
    loss: tuple[float, float]
    table: tuple[tuple[int, int, int], ...]
    other_wrong: int
    difference: float
    interval: tuple[float, float]
    mcnemar_p: float
    detectable: float | None
    confidence: dict[str, tuple[float, float]]
    classes: tuple[ClassChange, ...]
    moves: tuple[Move, ...]
    flips: tuple[Flip, ...]

    @property
    def both_right(self) -> int:
        """Images that both get right."""
        return self.table[0][0]

    @property
    def lost(self) -> int:
        """Images that A gets right and B wrong."""
        return self.table[0][1]

    @property
    def gained(self) -> int:
        """Images that A gets wrong and B right."""
        return self.table[1][0]

    @property
    def both_wrong(self) -> int:
        """Images that both get wrong."""
        return self.table[1][1]

    @property
    def broken(self) -> int:
        """Images without a finite output of A, of B or of both."""
        return sum(self.not_finite) - self.table[2][2]

    @property
    def churn(self) -> int:
        """Images whose top-1 prediction changed, or that have none."""
        return self.lost + self.gained + self.other_wrong + self.broken

    def count(self, kind: str) -> int:
        """How many flips are of that kind."""
        return self.broken if kind == "not_finite" else int(getattr(self, kind))

    def held(self, max_drop: float) -> tuple[tuple[float, float] | None, float]:
        """In percentage points of top-1."""
        interval = self.interval
        if self.level != LEVEL:  # of finite judgements, since others are ruled out before
            low, high = difference_interval(self.gained, self.lost, self.n, self.level)
            interval = 100 * low, 100 * high
        return interval, max_drop

    def words(self, label: int | None) -> str:
        """A class's short name, see `short_names`; `not finite` for None."""
        return NOT_FINITE if label is None else self.short[label]

    def to_json(self) -> dict[str, Any]:
        """The keys that scripts may rely on: n, acc1, acc5, churn, gained, lost, mcnemar_p, flips."""

        def name(label: int | None) -> dict[str, Any]:
            if label is None:
                return {"index": None, "id": None, "words": None}
            return {"index": label, "id": self.class_names[label][0], "words": self.class_names[label][1]}

        def flip(f: Flip) -> dict[str, Any]:
            a = {**name(f.a), "confidence": f.confidence_a, "loss": f.loss_a}
            b = {**name(f.b), "confidence": f.confidence_b, "loss": f.loss_b}
            return {"index": f.index, "name": f.name, "kind": f.kind, "label": name(f.label), "a": a, "b": b}

        def change(c: ClassChange) -> dict[str, Any]:
            tail = {
                k: getattr(c, k) for k in ("n", "right_a", "right_b", "gained", "lost", "not_finite", "p", "adjusted_p")
            }
            return {**name(c.label), **tail}

        report = {
            "kind": "images",
            **self.sides(),
            "equal": self.equal,
            "n": self.n,
            "acc1": _two(self.acc1),
            "acc5": _two(self.acc5),
            "loss": _two(self.loss),
            "difference": self.difference,
            "interval": self.interval,
            "level": LEVEL,
            "mcnemar_p": self.mcnemar_p,
            "detectable_difference": self.detectable,
            "power": POWER,
            "churn": self.churn,
            "churn_rate": self.churn / self.n,
            "gained": self.gained,
            "lost": self.lost,
            "other_wrong": self.other_wrong,
            "not_finite": {**_two(self.not_finite), "either": self.broken},
            "both_right": self.both_right,
            "both_wrong": self.both_wrong,
            "states": {a: dict(zip(STATES, row, strict=True)) for a, row in zip(STATES, self.table, strict=True)},
            **self.decision(),
            "confidence": {kind: _two(pair) for kind, pair in self.confidence.items()},
            "classes": [change(c) for c in self.classes],
            "moves": [{"label": name(m.label), "a": name(m.a), "b": name(m.b), "count": m.count} for m in self.moves],
            "flips": [flip(f) for f in self.flips],
        }
        return dict(plain(report))

    def to_csv(self) -> str:
        """The flips, one a line, worst first; a side that is not finite has an empty class and numbers `nan`."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        head = "name,label,label_id,label_words,kind,a,a_words,a_confidence,a_loss,b,b_words,b_confidence,b_loss"
        writer.writerow(head.split(","))
        for f in self.flips:
            a, b = (("" if k is None else csv_cell(self.class_names[k][1])) for k in (f.a, f.b))
            left = (f.a, a, f"{f.confidence_a:.6f}", f"{f.loss_a:.6f}")
            right = (f.b, b, f"{f.confidence_b:.6f}", f"{f.loss_b:.6f}")
            true = map(csv_cell, self.class_names[f.label])
            writer.writerow((csv_cell(f.name), f.label, *true, f.kind, *left, *right))
        return out.getvalue()


def _two(pair: tuple[float, float]) -> dict[str, Any]:
    return {"a": pair[0], "b": pair[1]}
