"""Which images do two checkpoints predict differently? Top-1 decides; the statistics are those of `statistics`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.diff.changes import KINDS, UNCHANGED, Judgements, tally
from rayexp.diff.images_report import ClassChange, Flip, ImagesReport, Move
from rayexp.diff.pair import Checkpoint, check, equal, top1
from rayexp.diff.statistics import adjust, detectable_difference, difference_interval, mcnemar
from rayexp.display import short_names
from rayexp.errors import UserError
from rayexp.runs.records import Predictions


def diff_images(a: Checkpoint, b: Checkpoint) -> ImagesReport:
    """Compare two checkpoints' judgements of the same images.

    Raises:
        UserError: they are not of the same images, or the runs' data.json does not fit.
    """
    check(a, b)
    p, q = a.predictions, b.predictions
    label = p["label"]
    if not np.array_equal(label, q["label"]):
        raise UserError(f"{a.name} and {b.name} disagree on the true labels of the same data; one of them is damaged")
    class_names, names = _names(a, b)
    changes = Judgements.of(p).changes(Judgements.of(q))
    count, changed = tally(changes), changes != UNCHANGED
    first, second = top1(p), top1(q)
    was, now = _states(p), _states(q)
    right_a, right_b = was == 0, now == 0
    table = np.bincount(3 * was + now, minlength=9).reshape(3, 3).tolist()
    # The test knows right and wrong alone.
    gained, lost, n = int((~right_a & right_b).sum()), int((right_a & ~right_b).sum()), len(label)
    low, high = difference_interval(gained, lost, n)
    smallest = detectable_difference(gained + lost, n)
    flips = _flips(a, b, np.flatnonzero(changed), changes, names)
    return ImagesReport(
        a=a,
        b=b,
        class_names=class_names,
        short=short_names(class_names),
        n=n,
        acc1=(100 * float(right_a.mean()), 100 * float(right_b.mean())),
        acc5=(_top5(p), _top5(q)),
        loss=(float(p["loss"].mean(dtype=np.float64)), float(q["loss"].mean(dtype=np.float64))),
        table=tuple((x, y, z) for x, y, z in table),
        other_wrong=count["other_wrong"],
        not_finite=(sum(table[2]), sum(row[2] for row in table)),
        equal=equal(a, b, int(changed.sum())),
        difference=100 * (gained - lost) / n,
        interval=(100 * low, 100 * high),
        mcnemar_p=float(mcnemar(gained, lost)),
        detectable=None if smallest is None else 100 * smallest,
        confidence=_confidence(flips),
        classes=_classes(label, right_a, right_b, changes, len(class_names)),
        moves=_moves(label[changed], first[changed], second[changed], len(class_names)),
        flips=flips,
    )


def _states(p: Predictions) -> NDArray[np.int64]:
    """int64[n]: positions in STATES."""
    return np.where(p.finite, np.where(top1(p) == p["label"], 0, 1), 2)


def _top5(p: Predictions) -> float:
    return 100 * float(((p["top5"] == p["label"][:, None]).any(axis=1) & p.finite).mean())


def _names(a: Checkpoint, b: Checkpoint) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """Classes and image names of data.json, checked against the predictions of both."""
    tables = []
    for side in (a, b):
        data, path = side.run.data(), side.run.data_path
        try:
            tables.append((tuple((str(i), str(w)) for i, w in data["classes"]), [str(n) for n in data["val_names"]]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: `classes` as [id, words] and `val_names` are expected ({error!r})") from error
        classes, names = tables[-1]
        named = (side.predictions["label"], side.predictions["top5"][side.predictions.finite])
        largest, smallest = max(int(x.max(initial=0)) for x in named), min(int(x.min(initial=0)) for x in named)
        if smallest < 0 or largest >= len(classes):
            raise UserError(f"{path}: lists {len(classes)} classes, but {side.name} names class {largest or smallest}")
        if int(side.predictions["index"][-1]) >= len(names):
            raise UserError(f"{path}: lists {len(names):,} validation images, but {side.name} judged more")
    if [c[0] for c in tables[0][0]] != [c[0] for c in tables[1][0]]:
        raise UserError(f"{a.name} and {b.name} do not have the same classes in the same order")
    return tables[0]


def _flips(a: Checkpoint, b: Checkpoint, rows: NDArray[Any], code: NDArray[Any], names: list[str]) -> tuple[Flip, ...]:
    p, q = a.predictions, b.predictions
    # A diverged model's NaN counts as the worst judgement there is.
    was, now = (np.nan_to_num(x["loss"][rows].astype(np.float64), nan=1e9, posinf=1e9) for x in (p, q))
    order = np.lexsort((rows, was - now, code[rows]))
    columns = (
        p["index"][rows], p["label"][rows], code[rows], top1(p)[rows], top1(q)[rows],
        p["confidence"][rows], q["confidence"][rows], p["loss"][rows], q["loss"][rows],
    )  # fmt: skip
    return tuple(
        Flip(index, names[index], label, KINDS[kind], _known(first), _known(second), *numbers)
        for index, label, kind, first, second, *numbers in zip(*(c[order].tolist() for c in columns), strict=True)
    )


def _known(label: int) -> int | None:
    return None if label < 0 else label


def _confidence(flips: tuple[Flip, ...]) -> dict[str, tuple[float, float]]:
    medians = {}
    for kind in KINDS:
        pairs = np.array([(f.confidence_a, f.confidence_b) for f in flips if f.kind == kind])
        if len(pairs):
            medians[kind] = (_median(pairs[:, 0]), _median(pairs[:, 1]))
    return medians


def _median(values: NDArray[np.float64]) -> float:
    """Of those that are finite; NaN where none is."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def _classes(
    label: NDArray[Any], right_a: NDArray[Any], right_b: NDArray[Any], changes: NDArray[np.int8], count: int
) -> tuple[ClassChange, ...]:
    def tallied(mask: NDArray[Any]) -> NDArray[Any]:
        return np.bincount(label[mask], minlength=count)

    n, a, b = np.bincount(label, minlength=count), tallied(right_a), tallied(right_b)
    seen = np.flatnonzero(n)
    p = mcnemar(tallied(~right_a & right_b)[seen], tallied(right_a & ~right_b)[seen])
    adjusted = adjust(p)
    gained, lost, broken = (tallied(changes == KINDS.index(kind)) for kind in ("gained", "lost", "not_finite"))
    rows = [
        ClassChange(*row)
        for row in zip(
            *(x.tolist() for x in (seen, *(x[seen] for x in (n, a, b, gained, lost, broken)), p, adjusted)), strict=True
        )
    ]
    return tuple(sorted(rows, key=lambda c: (c.right_b - c.right_a, c.p, c.label)))


def _moves(label: NDArray[Any], a: NDArray[Any], b: NDArray[Any], count: int) -> tuple[Move, ...]:
    """The largest moves first; -1, not finite, is a prediction of its own."""
    base = count + 1
    keys, counts = np.unique((label.astype(np.int64) * base + a + 1) * base + b + 1, return_counts=True)
    order = np.lexsort((keys, -counts))
    return tuple(
        Move(k // (base * base), _known(k // base % base - 1), _known(k % base - 1), c)
        for k, c in zip(keys[order].tolist(), counts[order].tolist(), strict=True)
    )
