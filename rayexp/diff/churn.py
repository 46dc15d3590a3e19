"""When did the model stop changing its mind? Churn between the epochs of a run.

Images: the share of validation images with another top-1 prediction. Language: the share of tokens whose probability
more than doubled or halved. Samples: the share whose loss moved by more than a tenth of the median. A sample without a
finite output is judged differently from every other (the rule: `changes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.diff.changes import UNCHANGED, Judgements, default_tolerance, tally
from rayexp.diff.documents import perplexity
from rayexp.diff.pair import Checkpoint, check, top1
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
        metric: acc1 in percent, perplexity, or the mean loss.
        changed: judged differently from the epoch before; None for the first.
        to_last: judged differently from the last epoch.
        settled: judged as in the last epoch from here on, without a break.
        forgotten: images right in the epoch before and wrong now (a forgetting event: M. Toneva et al., ICLR 2019);
            language: tokens whose probability halved; samples: whose loss rose. None for the first.
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
        tolerance: by how much a loss must move to count; 0 for images.
        epochs: all of them.
        matrix: float64[k, k] in percent, symmetric, zero on the diagonal but for samples that are not finite.
        sampled: the k epochs of the matrix: all, or as many as allowed, spread evenly from the first to the last.
    """

    run: Run
    kind: str
    n: int
    tolerance: float
    epochs: tuple[EpochChurn, ...]
    matrix: NDArray[np.float64]
    sampled: tuple[int, ...]

    @property
    def metric_name(self) -> str:
        """`acc1`, `ppl` or `val_loss`."""
        return {"images": "acc1", "tokens": "ppl"}.get(self.kind, "val_loss")

    @property
    def events(self) -> tuple[str, str]:
        """What `forgotten` and `learned` are called."""
        return {"images": ("forgotten", "learned"), "tokens": ("halved", "doubled")}.get(self.kind, ("lost", "gained"))

    @property
    def rule(self) -> str:
        """When a judgement counts as changed, as a sentence."""
        if self.kind == "images":
            return "An image changed where its top-1 prediction did."
        if self.kind == "tokens":
            return "A token changed where its probability more than doubled or halved."
        return f"A sample changed where its loss moved by more than {self.tolerance:.3g}, a tenth of the last median."

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
        things = self.kind
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
        head = {
            "kind": self.kind,
            "run": self.run.id,
            "n": self.n,
            "tolerance": self.tolerance,
            "settled_epoch": self.settled_epoch,
        }
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
    held: dict[int, Judgements] = {}
    rows: list[EpochChurn] = []
    kind, tolerance = "", 0.0
    for epoch, p in _backwards(run, epochs):
        if not rows:
            kind, tolerance = p.kind, default_tolerance(p, p)
            final = after = Judgements.of(p, tolerance)
            kept = np.ones(len(p), dtype=bool)
        judged = Judgements.of(p, tolerance)
        if rows:
            changes = judged.changes(after)
            counts = tally(changes)
            rows[-1] = replace(
                rows[-1], changed=_percent(changes != UNCHANGED), forgotten=counts["lost"], learned=counts["gained"]
            )
        unlike = judged.changes(final) != UNCHANGED
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
        after = judged
    matrix = np.zeros((len(sampled), len(sampled)))
    for i, first in enumerate(sampled):
        for j, second in enumerate(sampled[: i + 1]):
            matrix[i, j] = matrix[j, i] = _percent(held[first].changes(held[second]) != UNCHANGED)
    return ChurnReport(run, kind, len(kept), tolerance, tuple(rows[::-1]), matrix, sampled)


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


def _percent(mask: NDArray[np.bool_]) -> float:
    return 100 * np.count_nonzero(mask) / len(mask)


def _metric(p: Predictions) -> float:
    if p.kind == "images":
        return 100 * float((top1(p) == p["label"]).mean())
    loss = p["loss"].mean(dtype=np.float64)
    return perplexity(loss) if p.kind == "tokens" else float(loss)
