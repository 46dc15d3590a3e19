"""One stretch of a run: what lies between two stored states is trained again, and what comes out is compared."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayexp.config import ExperimentConfig
from rayexp.errors import UserError
from rayexp.launch import local, processes
from rayexp.launch.job import WorkerJob
from rayexp.launch.resuming import without_advice
from rayexp.launch.screen import Screen
from rayexp.runs.integrity import predictions_fault
from rayexp.runs.manifest import STATE, WEIGHTS, broken, has_valid_seal
from rayexp.runs.records import EpochRecord
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter

if TYPE_CHECKING:
    from rich.console import Console

COMPARED = ("step", "train_loss", "val_loss", "lr", "weights_sha", "state_sha")
Outcome = Literal["proven", "differs", "damaged", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """What lies between two neighbouring stored states.

    Attributes:
        first: the epoch after which it begins; 0: at the initial weights.
        last: the epoch with which it ends.
        steps: optimizer steps from one to the other.
    """

    first: int
    last: int
    steps: int

    def __str__(self) -> str:
        return f"epoch {self.first} -> {self.last}"


@dataclass(frozen=True, slots=True)
class Retrained:
    """What came of training a stretch again.

    Attributes:
        stretch: which one.
        outcome: `proven`: the same bits. `differs`: others. `damaged`: a stored file is not what was written.
            `inconclusive`: other bits, on another kind of machine than the run's.
        detail: what differs or is damaged first; empty where it is proven.
        seconds: wall-clock time.
    """

    stretch: Stretch
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0


def stretches(run: Run) -> list[Stretch]:
    """The stretches of a run, in order; one is longer than an epoch where checkpoints have been removed.

    Raises:
        UserError: no state is stored, or the run does not say how many steps an epoch has.
    """
    kept = run.epochs()
    if not kept:
        raise UserError(f"{run.id}: has no checkpoint of an epoch in {run.checkpoints}; nothing can be compared")
    steps = _epoch_steps(run)
    return [Stretch(a, b, (b - a) * steps) for a, b in itertools.pairwise([0, *kept])]


def _epoch_steps(run: Run) -> int:
    found = [run.meta().get("steps_per_epoch"), *(state.get("steps") for _, state in run.resumable())]
    for steps in found:
        if isinstance(steps, int) and steps > 0:
            return steps
    raise UserError(f"{run.id}: neither run.json nor a state.json says how many steps an epoch has")


def retrain(
    run: Run, config: ExperimentConfig, stretch: Stretch, workers: int, console: Console | None
) -> tuple[Retrained, list[str]]:
    """Train a stretch again, and compare.

    Args:
        run: not written to.
        config: the run's, with what this machine is to do differently.
        stretch: one of `stretches`.
        workers: 0: in this process; else so many processes here.
        console: where progress is shown; None: nowhere.

    Returns:
        What came of it, and in what this machine differs from the run's (fingerprint).

    Raises:
        UserError, RunError: it could not be trained.
    """
    for epoch in (stretch.first, stretch.last):
        if epoch and (why := _state_fault(run, epoch)):
            return Retrained(stretch, "damaged", why), []
    if why := _stored_fault(run, stretch):
        return Retrained(stretch, "damaged", why), []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rayexp-audit-") as folder:
        made = Run.create(config.model_copy(update={"storage_path": Path(folder)}), argv=["audit", run.id])
        weights, about = RunWriter(run).weights()
        if weights:
            RunWriter(made).keep_weights(weights, about)
        if stretch.first:
            shutil.copytree(run.checkpoint(stretch.first), made.checkpoint(stretch.first))
        _train(made, run, stretch, workers, console)
        seconds = time.monotonic() - began
        unlike, known = _machine(run, made, stretch)
        differs = next(_differences(run, made, stretch), "")
    if not differs:
        return Retrained(stretch, "proven", "", seconds), unlike
    return Retrained(stretch, "differs" if known and not unlike else "inconclusive", differs, seconds), unlike


def _state_fault(run: Run, epoch: int) -> str | None:
    folder = run.checkpoint(epoch)
    if why := broken(folder):
        return f"{folder.relative_to(run.root)}: {why}"
    if lacking := sorted(STATE.keys() - json.loads((folder / "state.json").read_bytes()).keys()):
        return f"{folder.relative_to(run.root)}: state.json lacks {', '.join(lacking)}"
    return None


def _stored_fault(run: Run, stretch: Stretch) -> str | None:
    """What is wrong with the records and predictions of a stretch, or None."""
    for name in ("epochs.jsonl", *([WEIGHTS] if run.config().model.weights else [])):
        if why := run.fault(name):
            return f"{name}: {why}"
    try:
        records = _records(run, stretch)
    except UserError as error:
        return str(error).removeprefix(f"{run.root}/")
    for record in records:
        path = run.predictions_path(record.epoch)
        if path.exists() and (why := predictions_fault(path, record)):
            return f"predictions/{path.name}: {why}"
    return None


def _train(made: Run, run: Run, stretch: Stretch, workers: int, console: Console | None) -> None:
    gpu = run.meta().get("device") == "cuda"
    config = made.config()
    # A step more, unless it is the last: an epoch is whole when the next one begins, and the schedule stays the run's.
    stop = (stretch.last * stretch.steps) // (stretch.last - stretch.first) + 1
    job = WorkerJob(
        run=made.root.absolute(),
        config=config.absolute(),
        device="cuda" if gpu else "cpu",
        cpus=max(1, local.here().cpus // workers) if workers else None,
        max_steps=stop,
    )
    screen = Screen(made, console, named=False)
    screen.open()
    try:
        with without_advice():
            if workers:
                processes.wait(made.root, processes.start(job, workers))
            else:
                local.attempt(made, job)
    finally:
        screen.close()


def _machine(run: Run, made: Run, stretch: Stretch) -> tuple[list[str], bool]:
    """In what this machine differs from the run's, and whether the run says on what it was trained."""
    from rayexp.engine.fingerprint import differences

    now = _fields(made, stretch.last).get("fingerprint") or {}
    states = [_fields(run, epoch).get("fingerprint") for epoch in (stretch.first, stretch.last) if epoch]
    found = [line for state in states if state for line in differences(state, now)]
    return list(dict.fromkeys(found)), all(states)


def _differences(run: Run, made: Run, stretch: Stretch) -> Iterator[str]:
    """What differs between a run and a stretch of it that was trained again, the most telling first."""
    from rayexp.engine import checkpoint

    stored, again = (
        checkpoint.decode({file.name: file.read_bytes() for file in each.checkpoint(stretch.last).iterdir()})
        for each in (run, made)
    )
    # The bytes themselves are compared, since whoever alters a state can write any hash beside it.
    for name in dict.fromkeys([*stored.tensors, *again.tensors]):
        pair = [state.tensors.get(name) for state in (stored, again)]
        one, other = (checkpoint.sha({name: tensor}) if tensor is not None else None for tensor in pair)
        if one != other:
            yield f"the tensor {name.removeprefix('model.')}"
    if stored.fields["schedule"] != again.fields["schedule"]:
        yield "the schedule's state"
    now = {record.epoch: record.to_json() for record in made.records()}
    for record in _records(run, stretch):
        then, fresh = record.to_json(), now[record.epoch]
        for key in (*COMPARED, *record.metrics):
            if then[key] != "" and then[key] != fresh.get(key):
                yield f"{key} of epoch {record.epoch} in epochs.jsonl"
        if _trained(run, record) and not run.predictions(record.epoch).same_as(made.predictions(record.epoch)):
            yield f"the predictions of epoch {record.epoch}"


def _trained(run: Run, record: EpochRecord) -> bool:
    """Whether an epoch's predictions are there, and those of training: `evaluate` may have made them, elsewhere."""
    path = run.predictions_path(record.epoch)
    return path.exists() and not has_valid_seal(path.read_bytes(), record.weights_sha)


def _records(run: Run, stretch: Stretch) -> list[EpochRecord]:
    return [record for record in run.records() if stretch.first < record.epoch <= stretch.last]


def _fields(run: Run, epoch: int) -> dict[str, Any]:
    return dict(json.loads((run.checkpoint(epoch) / "state.json").read_bytes()))
