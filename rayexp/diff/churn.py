"""When did the model stop changing its mind? Churn between the epochs of a run.

Images: the share of validation images with another top-1 prediction. Language: the share of tokens whose probability
more than doubled or halved (see `text`). A sample without a finite output is judged differently from every other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.diff.pair import Checkpoint, check, top1
from rayexp.diff.text import FACTOR
from rayexp.display import plain
from rayexp.errors import UserError
from rayexp.runs.records import Predictions
from rayexp.runs.run import Run

SETTLED = 90.0  # percent of the samples
MATRIX_EPOCHS = 128  # epochs of the matrix at most: its pages and files grow with the square


@dataclass(frozen=True, slots=True)
class EpochChurn:
    """One epoch. Percent of the n samples, but for the counts `forgotten`, `learned` and `not_finite`.

    Attributes:
        epoch: counts from 1.
        metric: acc1 in percent, or perplexity.
        changed: judged differently from the epoch before; None for the first.
        to_last: judged differently from the last epoch.
        settled: judged as in the last epoch from here on, without a break.
        forgotten: images right in the epoch before and wrong now (a forgetting event: M. Toneva et al., ICLR 2019);
            language: tokens whose probability halved. None for the first.
        learned: the reverse.
        not_finite: samples without a finite output; in no other count.
    """

    epoch: int
    metric: float
    changed: float | None
    to_last: float
    settled: float
    forgotten: int | None
    learned: int | None
    not_finite: int


@dataclass(frozen=True, slots=True)
class ChurnReport:
    """Churn of a run.

    Attributes:
        epochs: all of them.
        matrix: float64[k, k] in percent, symmetric, zero on the diagonal but for samples that are not finite.
        sampled: the k epochs of the matrix: all, or as many as allowed, spread evenly from the first to the last.
    """

    run: Run
    kind: str
    n: int
    epochs: tuple[EpochChurn, ...]
    matrix: NDArray[np.float64]
    sampled: tuple[int, ...]

    @property
    def metric_name(self) -> str:
        """`acc1` or `ppl`."""
        return "acc1" if self.kind == "images" else "ppl"

    @property
    def settled_epoch(self) -> int | None:
        """The first epoch from which on at least 90 % of the samples keep their final judgement; None where the last
        epoch itself has none for so many."""
        return next((e.epoch for e in self.epochs if e.settled >= SETTLED), None)

    @property
    def left_out(self) -> str:
        """What the matrix does not show, as a sentence; empty where it shows every epoch."""
        if len(self.sampled) == len(self.epochs):
            return ""
        return (
            f"The matrix holds {len(self.sampled)} of the {len(self.epochs):,} epochs, evenly spread; "
            "everything else counts all of them."
        )

    def answer(self) -> str:
        """One sentence."""
        first, last, when = self.epochs[0], self.epochs[-1], self.settled_epoch
        things = "images" if self.kind == "images" else "tokens"
        if first is last:
            return f"There is one epoch only, so there is nothing to compare ({self.n:,} {things})."
        if when is None:
            return f"{last.not_finite:,} of the {self.n:,} {things} are not finite in the last epoch ({last.epoch})."
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
        """Epochs, the matrix in percent with the epochs that it is of, and the epoch from which the model kept its
        mind."""
        rows = []
        for e in self.epochs:
            row = {name: getattr(e, name) for name in e.__slots__ if name != "metric"}
            rows.append({"epoch": e.epoch, self.metric_name: e.metric, **row})
        head = {"kind": self.kind, "run": self.run.id, "n": self.n, "settled_epoch": self.settled_epoch}
        matrix = {
            "matrix_epochs": self.sampled,
            "epochs_left_out": len(self.epochs) - len(self.sampled),
            "churn_matrix": self.matrix,
        }
        return dict(plain({**head, "epochs": rows, **matrix}))


def diff_all(run: Run, epochs: list[int], limit: int = MATRIX_EPOCHS) -> ChurnReport:
    """Churn of the run's epochs (at least one), all of which have stored predictions.

    Every epoch is read once, from the last to the first, and held only where the matrix needs it.

    Args:
        limit: epochs of the matrix, at least 2.

    Raises:
        UserError: predictions are missing, damaged or of different data.
    """
    if not epochs:
        raise UserError(f"{run.id}: no epoch has finished")
    sampled = _spread(epochs, limit)
    held: dict[int, NDArray[np.float32]] = {}
    rows: list[EpochChurn] = []
    after: Predictions | None = None
    for epoch, p in _backwards(run, epochs):
        judged = _judgements(p)
        if after is None:
            tolerance = FACTOR if p.kind == "tokens" else 0.0
            final, kept = judged, np.ones(len(judged), dtype=bool)
        else:
            lost, gained = _events(p, after)
            changed = _percent(_differ(judged, _judgements(after), tolerance))
            rows[-1] = replace(rows[-1], changed=changed, forgotten=lost, learned=gained)
        unlike = _differ(judged, final, tolerance)
        kept &= ~unlike
        rows.append(
            EpochChurn(
                epoch=epoch,
                metric=_metric(p),
                changed=None,
                to_last=_percent(unlike),
                settled=_percent(kept),
                forgotten=None,
                learned=None,
                not_finite=int((~p.finite).sum()),
            )
        )
        if epoch in sampled:
            held[epoch] = judged
        after = p
    matrix = np.zeros((len(sampled), len(sampled)))
    for i, first in enumerate(sampled):
        for j, second in enumerate(sampled[: i + 1]):
            matrix[i, j] = matrix[j, i] = _percent(_differ(held[first], held[second], tolerance))
    return ChurnReport(run, p.kind, len(final), tuple(rows[::-1]), matrix, sampled)


def _spread(epochs: list[int], limit: int) -> tuple[int, ...]:
    if len(epochs) <= limit:
        return tuple(epochs)
    return tuple(epochs[round(i)] for i in np.linspace(0, len(epochs) - 1, limit))


def _backwards(run: Run, epochs: list[int]) -> Iterator[tuple[int, Predictions]]:
    """The epochs' predictions, the last first, each checked against the last."""
    last = None
    for epoch in reversed(epochs):
        checkpoint = Checkpoint(run, epoch, run.predictions(epoch), "")
        last = last or checkpoint
        check(last, checkpoint)
        yield epoch, checkpoint.predictions


def _judgements(p: Predictions) -> NDArray[np.float32]:
    """Images: the class as a number. Tokens: the loss. NaN, which differs from itself, where the output is not finite.

    Args:
        p: of n samples.
    """
    judged = p["top5"][:, 0] if p.kind == "images" else p["loss"]
    return np.where(p.finite, judged, np.nan).astype(np.float32)


def _differ(a: NDArray[np.float32], b: NDArray[np.float32], tolerance: float) -> NDArray[np.bool_]:
    return np.asarray(~(np.abs(a - b) <= tolerance))


def _percent(mask: NDArray[np.bool_]) -> float:
    return 100 * np.count_nonzero(mask) / len(mask)


def _events(before: Predictions, after: Predictions) -> tuple[int, int]:
    """How many finite samples were forgotten and learned."""
    whole = before.finite & after.finite
    if before.kind == "images":
        was, now = top1(before) == before["label"], top1(after) == after["label"]
        return int((was & ~now)[whole].sum()), int((~was & now)[whole].sum())
    change = after["loss"][whole] - before["loss"][whole]
    return int((change > FACTOR).sum()), int((change < -FACTOR).sum())


def _metric(p: Predictions) -> float:
    if p.kind == "images":
        return 100 * float((top1(p) == p["label"]).mean())
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(p["loss"].mean(dtype=np.float64))))
