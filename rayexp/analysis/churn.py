"""When did the model stop changing its mind? Churn between every two epochs of a run.

Images: the share of validation images with another top-1 prediction. Language: the share of tokens whose probability
more than doubled or halved (see `text_diff`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.analysis.pair import Checkpoint, check, read
from rayexp.analysis.paired import plain
from rayexp.analysis.text_diff import FACTOR
from rayexp.errors import UserError
from rayexp.runs import Run

SETTLED = 90.0  # percent of the samples


@dataclass(frozen=True, slots=True)
class EpochChurn:
    """One epoch. Percent of the n samples, but for `forgotten` and `learned`.

    Attributes:
        epoch: counts from 1.
        metric: acc1 in percent, or perplexity.
        changed: judged differently from the epoch before; None for the first.
        to_last: judged differently from the last epoch.
        settled: judged as in the last epoch from here on, without a break.
        forgotten: images right in the epoch before and wrong now (a forgetting event: M. Toneva et al., ICLR 2019);
            language: tokens whose probability halved. None for the first.
        learned: the reverse.
    """

    epoch: int
    metric: float
    changed: float | None
    to_last: float
    settled: float
    forgotten: int | None
    learned: int | None


@dataclass(frozen=True, slots=True)
class ChurnReport:
    """Churn of a run. `matrix` is float64[epochs, epochs] in percent, symmetric, zero on the diagonal."""

    run: Run
    kind: str
    n: int
    epochs: tuple[EpochChurn, ...]
    matrix: NDArray[np.float64]

    @property
    def metric_name(self) -> str:
        """`acc1` or `ppl`."""
        return "acc1" if self.kind == "images" else "ppl"

    @property
    def settled_epoch(self) -> int:
        """The first epoch from which on at least 90 % of the samples keep their final judgement."""
        return next(e.epoch for e in self.epochs if e.settled >= SETTLED)

    def answer(self) -> str:
        """One sentence."""
        first, last, when = self.epochs[0], self.epochs[-1], self.settled_epoch
        things = "images" if self.kind == "images" else "tokens"
        if first is last:
            return f"There is one epoch only, so there is nothing to compare ({self.n:,} {things})."
        if when == first.epoch:
            return f"{SETTLED:.0f} % of the {things} keep their judgement from the first epoch ({when}) on."
        if when == last.epoch:
            return (
                f"It has not settled: {last.changed:.1f} % of the {things} still changed in the last epoch "
                f"({last.epoch})."
            )
        return (
            f"{SETTLED:.0f} % of the {things} keep their final judgement from epoch {when} on; "
            f"{last.changed:.1f} % still changed in the last epoch ({last.epoch})."
        )

    def to_json(self) -> dict[str, Any]:
        """Epochs, the matrix in percent, and the epoch from which the model kept its mind."""
        rows = []
        for e in self.epochs:
            row = {name: getattr(e, name) for name in e.__slots__ if name != "metric"}
            rows.append({"epoch": e.epoch, self.metric_name: e.metric, **row})
        head = {"kind": self.kind, "run": self.run.id, "n": self.n, "settled_epoch": self.settled_epoch}
        return dict(plain({**head, "epochs": rows, "churn_matrix": self.matrix.tolist()}))


def diff_all(run: Run, epochs: list[int]) -> ChurnReport:
    """Churn between every two of the run's epochs (at least one), all of which have stored predictions.

    Raises:
        UserError: predictions are missing, damaged or of different data.
    """
    if not epochs:
        raise UserError(f"{run.id}: no epoch has finished")
    checkpoints = [read(run, epoch) for epoch in epochs]
    for checkpoint in checkpoints:
        check(checkpoints[0], checkpoint)
    kind = checkpoints[0].predictions.kind
    differs = _images if kind == "images" else _tokens
    judged = _judgements(checkpoints)
    count, n = len(epochs), judged.shape[1]
    matrix = np.zeros((count, count))
    final = np.empty((count, n), dtype=bool)  # judged as the last epoch did
    for i in range(count):
        for j in range(i + 1, count):
            moved = differs(judged[i], judged[j])
            matrix[i, j] = matrix[j, i] = 100 * np.count_nonzero(moved) / n
        final[i] = ~differs(judged[i], judged[-1])
    kept = np.logical_and.accumulate(final[::-1])[::-1]
    rows = []
    for i, checkpoint in enumerate(checkpoints):
        lost = gained = None
        if i:
            lost, gained = _events(checkpoints[i - 1], checkpoint)
        rows.append(
            EpochChurn(
                epoch=checkpoint.epoch,
                metric=_metric(checkpoint),
                changed=float(matrix[i - 1, i]) if i else None,
                to_last=float(matrix[i, -1]),
                settled=100 * float(kept[i].mean()),
                forgotten=lost,
                learned=gained,
            )
        )
    return ChurnReport(run, kind, n, tuple(rows), matrix)


def _judgements(checkpoints: list[Checkpoint]) -> NDArray[Any]:
    if checkpoints[0].predictions.kind == "images":
        return np.stack([c.predictions["top5"][:, 0] for c in checkpoints])
    return np.stack([c.predictions["loss"] for c in checkpoints])


def _images(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(a != b)


def _tokens(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(np.abs(a - b) > FACTOR)


def _events(before: Checkpoint, after: Checkpoint) -> tuple[int, int]:
    p, q = before.predictions, after.predictions
    if p.kind == "images":
        was, now = p["top5"][:, 0] == p["label"], q["top5"][:, 0] == q["label"]
        return int((was & ~now).sum()), int((~was & now).sum())
    change = q["loss"] - p["loss"]
    return int((change > FACTOR).sum()), int((change < -FACTOR).sum())


def _metric(checkpoint: Checkpoint) -> float:
    p = checkpoint.predictions
    if p.kind == "images":
        return 100 * float((p["top5"][:, 0] == p["label"]).mean())
    return float(np.exp(np.float64(p["loss"].mean(dtype=np.float64))))
