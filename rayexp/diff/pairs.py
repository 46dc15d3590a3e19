"""More than two checkpoints: every two of them compared, with p adjusted for the number of pairs.

What a reseed changes, and the slices, are adjusted likewise, over all pairs (Benjamini-Hochberg). `max_drop` is of
every other checkpoint against the first: with m of them, each is judged by the interval of 1 - 5 % / m (Bonferroni; O.
J. Dunn, J. Am. Stat. Assoc. 56 (1961) 52), so that all m verdicts are right together in 95 of 100.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayexp.diff.changes import KINDS
from rayexp.diff.documents import perplexity
from rayexp.diff.floors import OtherConfigurationError, beside
from rayexp.diff.noise import NoiseComparison, NoiseFloor, measure_of
from rayexp.diff.outcome import MEASURES, Outcome, adjusted, outcome
from rayexp.diff.pair import Checkpoint, check
from rayexp.diff.pair_report import parts
from rayexp.diff.report import Asked, compare, refuse_tolerance, tolerance_of
from rayexp.diff.slices import SlicesReport, read_attributes, slice_pairs
from rayexp.diff.statistics import LEVEL, DropVerdict, adjust
from rayexp.diff.weights import WeightsReport, diff_weights
from rayexp.display import plain
from rayexp.errors import UserError


@dataclass(frozen=True, slots=True)
class Pair:
    """The outcome from checkpoint number `a` to number `b`, both from 0, and what else was asked of the two.

    Attributes:
        noise: beside what a reseed changes; None where that is not known of their configurations.
        ruling: of `b` against the first checkpoint; None where `a` is another, or no verdict was asked.
        slices, weights: None where they were not asked.
    """

    a: int
    b: int
    outcome: Outcome
    noise: NoiseComparison | None = None
    ruling: DropVerdict | None = None
    slices: SlicesReport | None = None
    weights: WeightsReport | None = None

    def to_json(self, kind: str) -> dict[str, Any]:
        """The outcome, and `noise`, `verdict` and `verdict_reason`, null where there is none."""
        return {
            "a": self.a,
            "b": self.b,
            **self.outcome.to_json(kind),
            "noise": self.noise and self.noise.to_json(),
            "verdict": self.ruling and self.ruling.word,
            "verdict_reason": self.ruling and self.ruling.why,
            **parts(self.slices, self.weights),
        }


@dataclass(frozen=True, slots=True)
class PairsReport:
    """Three or more checkpoints on the same n samples.

    Attributes:
        measures: of each checkpoint: acc1 in percent, perplexity, or the mean loss.
        not_finite: samples of each checkpoint without a finite output.
        tolerance: by how much a loss of kind `samples` must move to count.
        pairs: every two, in the order in which they were given.
        max_drop: what the others may be worse by than the first; None where no verdict was asked.
    """

    kind: str
    n: int
    checkpoints: tuple[Checkpoint, ...]
    measures: tuple[float, ...]
    not_finite: tuple[int, ...]
    tolerance: float
    pairs: tuple[Pair, ...]
    max_drop: float | None = None

    @property
    def verdict(self) -> str | None:
        """Of all checkpoints against the first: FAIL where one fails, PASS where all pass, else INCONCLUSIVE."""
        words = {p.ruling.word for p in self.pairs if p.ruling}
        for word in ("FAIL", "INCONCLUSIVE", "PASS"):
            if word in words:
                return word
        return None

    @property
    def allowed(self) -> str:
        """What `max_drop` is counted in, as words."""
        goal = next(iter(self.checkpoints[0].run.goals()), "val_loss")
        return {"images": "points of acc1", "tokens": "percent of perplexity"}.get(self.kind, f"percent of {goal}")

    @property
    def floors(self) -> list[NoiseFloor]:
        """The noise floors that pairs are set beside, each once."""
        found = [p.noise.floor for p in self.pairs if p.noise]
        return list({(floor.runs, floor.epoch): floor for floor in found}.values())

    @property
    def changed(self) -> int:
        """Pairs that differ by more than chance."""
        return sum(p.outcome.adjusted_p is not None and p.outcome.adjusted_p < 0.05 for p in self.pairs)

    def letter(self, number: int) -> str:
        """What a checkpoint is called."""
        return letter(number)

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
                    "max_drop": self.max_drop,
                    "verdict": self.verdict,
                    "pairs": [p.to_json(self.kind) for p in self.pairs],
                }
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return self.to_json()

    def to_csv(self) -> str:
        """A line for each pair."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        measure = MEASURES[self.kind]
        kinds = [kind for kind in KINDS if kind != "other_wrong" or self.kind == "images"]
        head = ("a", "b", "n", f"a_{measure}", f"b_{measure}", "difference", "low", "high", "p", "adjusted_p", "churn")
        more: dict[str, list[str | None]] = {}
        if self.floors:
            more["reseeding"] = [p.noise.verdict if p.noise else None for p in self.pairs]
        if self.verdict:
            more["verdict"] = [p.ruling.word if p.ruling else None for p in self.pairs]
        writer.writerow((*head, *kinds, *more))
        for i, p in enumerate(self.pairs):
            o = p.outcome
            low, high = o.interval or ("", "")
            test = ("" if x is None else x for x in (o.p, o.adjusted_p))
            names = self.checkpoints[p.a].name, self.checkpoints[p.b].name
            counts = (getattr(o, kind) for kind in kinds)
            last = (values[i] or "" for values in more.values())
            writer.writerow((*names, o.n, o.a, o.b, o.difference, low, high, *test, o.churn, *counts, *last))
        return out.getvalue()


def diff_pairs(checkpoints: Sequence[Checkpoint], asked: Asked | None = None) -> PairsReport:
    """Compare every two of three or more checkpoints.

    Raises:
        UserError: they are not of the same data, or one is named twice; see also `report.answer`.
    """
    first, asked = checkpoints[0], asked or Asked()
    _check_all(checkpoints)
    refuse_tolerance(first, asked.tolerance)
    tolerance = tolerance_of(first, checkpoints[1], asked)
    kind = first.predictions.kind
    places = list(itertools.combinations(range(len(checkpoints)), 2))
    sides = [(checkpoints[i], checkpoints[j]) for i, j in places]
    outcomes = adjusted([outcome(a, b, None, tolerance) for a, b in sides])
    noises = _beside(sides, outcomes, tolerance, asked)
    rulings = _rulings(checkpoints, asked)
    sliced: list[SlicesReport | None] = [None] * len(sides)
    if asked.attributes:
        sliced = [*slice_pairs(read_attributes(first, asked.attributes), sides, tolerance)]
    measures = [measure_of(c.predictions) for c in checkpoints]
    return PairsReport(
        kind=kind,
        n=len(first.predictions),
        checkpoints=tuple(checkpoints),
        measures=tuple(perplexity(x) if kind == "tokens" else x for x in measures),
        not_finite=tuple(int((~c.predictions.finite).sum()) for c in checkpoints),
        tolerance=tolerance,
        pairs=tuple(
            Pair(
                i,
                j,
                outcomes[k],
                noise=noises[k],
                ruling=None if i else rulings.get(j),
                slices=sliced[k],
                weights=diff_weights(*((c.run, c.epoch) for c in sides[k])) if asked.weights else None,
            )
            for k, (i, j) in enumerate(places)
        ),
        max_drop=asked.max_drop,
    )


def _check_all(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse what cannot be compared (UserError)."""
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


def _beside(
    sides: Sequence[tuple[Checkpoint, Checkpoint]], outcomes: Sequence[Outcome], tolerance: float, asked: Asked
) -> list[NoiseComparison | None]:
    """Each pair beside its noise floor, with p adjusted for those that have one.

    Raises:
        UserError: runs were named that have the configuration of no checkpoint, or cannot be a floor.
    """
    if asked.floors is None:
        return [None] * len(sides)
    found: list[NoiseComparison | None] = []
    misfit = None
    for (a, b), o in zip(sides, outcomes, strict=True):
        try:
            found.append(beside(asked.floors(a, b, tolerance), a, b, o.churn))
        except OtherConfigurationError as error:
            misfit = error
            found.append(None)
    if misfit and not any(found):
        raise misfit
    tested = [(i, n, n.p) for i, n in enumerate(found) if n is not None and n.p is not None]
    values = adjust([p for *_, p in tested]).tolist() if tested else []
    for (i, n, _), value in zip(tested, values, strict=True):
        found[i] = replace(n, adjusted_p=value)
    return found


def _rulings(checkpoints: Sequence[Checkpoint], asked: Asked) -> dict[int, DropVerdict | None]:
    """The verdict on each checkpoint but the first, by number."""
    if asked.max_drop is None:
        return {}
    level = 1 - (1 - LEVEL) / (len(checkpoints) - 1)
    return {
        j: compare(checkpoints[0], c, asked.tolerance).within(asked.max_drop, level, letter(j)).ruling
        for j, c in enumerate(checkpoints[1:], 1)
    }


def letter(number: int) -> str:
    """`A` of 0, `Z` of 25, `27` of 26."""
    return chr(ord("A") + number) if number < 26 else str(number + 1)
