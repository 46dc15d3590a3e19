"""What rank 0 remembers of an epoch's steps, for steps.jsonl and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayexp.engine.trainer import StepDone

CURVES = "curves"  # in a snapshot's state.json: `loss` and `lr` of the begun epoch's steps, null where not known
Values = list[float | None]


class StepLog:
    """The steps of the present epoch.

    Loss and learning rate are those of all steps, also of those before a resume: a snapshot keeps them. Times are those
    of this process, as in the epoch's record.

    Args:
        before: steps of the whole run before this epoch.
    """

    def __init__(self, before: int = 0) -> None:
        self._begin(before)

    def _begin(self, before: int) -> None:
        self._before = before
        self._timed: list[StepDone] = []
        self._loss: Values = []
        self._lr: Values = []
        self._taken = 0

    @classmethod
    def resumed(cls, done: int, in_epoch: int, fields: Mapping[str, Any]) -> StepLog:
        """Go on from a checkpoint.

        Args:
            done: steps of the whole run that are done.
            in_epoch: those of the present epoch.
            fields: the checkpoint's state.json; of an older rayexp, it lacks the curves.
        """
        log = cls(done - in_epoch)
        curves = fields.get(CURVES) or {}
        log._loss, log._lr = ((list(curves.get(name, ())) + [None] * in_epoch)[:in_epoch] for name in ("loss", "lr"))
        return log

    def add(self, step: StepDone) -> None:
        """A step has ended."""
        self._timed.append(step)
        self._loss.append(_figures(step.loss))
        self._lr.append(_figures(step.lr))

    def curves(self) -> dict[str, Values]:
        """A copy of the curves so far, for a snapshot."""
        return {"loss": list(self._loss), "lr": list(self._lr)}

    def take(self) -> tuple[int, Values, Values]:
        """The part of the curves that was not taken yet, in this process: the number in the whole run of its first
        step, which counts from 1, its losses and its rates."""
        start, self._taken = self._taken, len(self._loss)
        return self._before + start + 1, self._loss[start:], self._lr[start:]

    def end(self, epoch: int) -> dict[str, Any]:
        """The epoch's line of steps.jsonl, see `runs.Run.steps`; the next epoch begins."""
        timed = self._timed
        names = timed[0].seconds if timed else {}
        line = {
            "epoch": epoch,
            "first": bool(timed) and timed[0].first,
            **self.curves(),
            "count": [step.count for step in timed],
            "total": [round(step.count / step.rate, 6) for step in timed],
            **{name: [round(step.seconds[name], 6) for step in timed] for name in names},
        }
        self._begin(self._before + len(self._loss))
        return line


def _figures(value: float) -> float:
    """Seven significant digits: those of a float32."""
    return float(f"{value:.7g}")
