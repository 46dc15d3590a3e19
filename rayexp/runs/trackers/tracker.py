"""Where a run can be followed while it trains (`tracking`): TensorBoard, MLflow, Weights & Biases, behind one protocol.

The run directory is what counts: metrics.csv and epochs.jsonl hold all that a tracker is told. TensorBoard's files are
part of it. What lies outside (`Service`) is told by a thread of its own (`BackgroundTracker`): it may fail, or not
answer, and training goes on as if it were not there.

    trackers/mlflow.json    the tracker's own id of the run, where it is, and how far it has been told: a resume goes on
    trackers/wandb/         what Weights & Biases keeps on disk (all there is, with WANDB_MODE=offline)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from rayexp.runs.records import EpochRecord
from rayexp.runs.run import Run
from rayexp.system.disk import write_json

# What chooses a tracker's place; a driver hands it to workers on other hosts. Nothing of it is secret.
VARIABLES = {
    "mlflow": ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
    "wandb": ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL"),
}

Axis = Literal["step", "epoch"]


class Tracker(Protocol):
    """Follows one run. Its methods are called one after another."""

    def begin(self) -> None:
        """Training begins, or goes on after an interruption: then in the tracker's same run."""

    def steps(self, first: int, loss: Sequence[float | None], lr: Sequence[float | None]) -> None:
        """Optimizer steps were done.

        Args:
            first: number of the first of them in the whole run, from 1.
            loss, lr: of this step and those after it; None where it is not known.
        """

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is whole on disk."""

    def end(self, status: str) -> None:
        """The run has ended: `done`, `failed` or `stopped`."""

    def take_warnings(self) -> list[str]:
        """What has gone wrong since the last call, a line each."""


class Service(Protocol):
    """A tracker outside the run directory. Its methods are called one after another, and may raise anything."""

    def begin(self) -> None:
        """See Tracker."""

    def log(self, rows: Sequence[tuple[int, Mapping[str, float]]], axis: Axis) -> None:
        """Points of curves that it does not have yet.

        Args:
            rows: the number of a step or an epoch, from 1, and its values by the name of their curve.
            axis: what the numbers count.
        """

    def end(self, status: str) -> None:
        """See Tracker."""


# ---------------------------------------------------------------------- what the run directory knows of a tracker


def recall(run: Run, name: str) -> dict[str, Any]:
    """trackers/<name>.json; empty where there is none that can be read."""
    try:
        return dict(json.loads((run.root / "trackers" / f"{name}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def remember(run: Run, name: str, **fields: Any) -> None:
    """Set fields of trackers/<name>.json."""
    write_json(run.root / "trackers" / f"{name}.json", recall(run, name) | fields)


def environment(run: Run, name: str) -> dict[str, str]:
    """The VARIABLES that say where a tracker is: what the driver has noted, else those of this process."""
    own = {variable: os.environ[variable] for variable in VARIABLES[name] if variable in os.environ}
    return own | dict(recall(run, name).get("environment", {}))


# ---------------------------------------------------------------------- what trackers are told


def scalars(record: EpochRecord) -> dict[str, float]:
    """The values of an epoch by the name of their curve."""
    return {
        "loss/train": record.train_loss,
        "loss/val": record.val_loss,
        "lr": record.lr,
        "throughput/samples_per_second": record.samples_per_second,
        **{f"metric/{name}": value for name, value in record.metrics.items()},
        **{f"seconds/{name}": value for name, value in record.seconds.items()},
    }


def points(
    first: int, loss: Sequence[float | None], lr: Sequence[float | None]
) -> Iterable[tuple[int, dict[str, float]]]:
    """The values of each step by the name of their curve, without those that are not known."""
    for step, values in enumerate(zip(loss, lr, strict=True), first):
        named = zip(("step/loss", "step/lr"), values, strict=True)
        if known := {name: value for name, value in named if value is not None}:
            yield step, known


def parameters(run: Run) -> dict[str, str]:
    """The run's id, and its resolved configuration under dotted keys."""

    def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
        for name, value in tree.items():
            if isinstance(value, Mapping) and value:
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value if isinstance(value, str) else json.dumps(value)

    return {"run": run.id, **dict(leaves(run.config().model_dump(mode="json")))}
