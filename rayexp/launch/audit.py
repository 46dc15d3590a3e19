"""Audit a finished run: train random stretches of it again, and compare what comes out with what is stored.

A stretch lies between two neighbouring stored states; the first begins at the initial weights. It is trained again from
the stored state at its beginning, with another number of workers, and must come to the same bits. Nothing but the run
directory and the data is needed, and nothing is written into the run.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayexp.config import ExperimentConfig, parse
from rayexp.config.references import provide
from rayexp.display import counted, with_workers
from rayexp.errors import UserError
from rayexp.launch import local, processes
from rayexp.launch.job import WorkerJob
from rayexp.launch.screen import Screen, show
from rayexp.runs.code import code_of
from rayexp.runs.integrity import predictions_fault
from rayexp.runs.manifest import STATE, WEIGHTS, broken, has_valid_seal
from rayexp.runs.records import EpochRecord, read_lines
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter

if TYPE_CHECKING:
    from rich.console import Console

SEGMENTS = 3
WORKERS = 2  # where the run was trained in one process
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


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of `audit`.

    Attributes:
        run: its id.
        seed: of the choice of stretches.
        workers: with how many they were trained again; 0: in this process.
        trained_with: with how many the run was trained, ascending.
        stretches: how many there are.
        steps: optimizer steps of all of them.
        retrained: the chosen ones, in order.
        machine: in what this machine differs from the run's (fingerprint); empty: in nothing that is known.
    """

    run: str
    seed: int
    workers: int
    trained_with: tuple[int, ...]
    stretches: int
    steps: int
    retrained: tuple[Retrained, ...]
    machine: tuple[str, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst of the stretches."""
        order: Sequence[Outcome] = ("differs", "damaged", "inconclusive")
        return next((o for o in order if any(each.outcome == o for each in self.retrained)), "proven")

    @property
    def share(self) -> float:
        """Share of the run's steps that is proven, 0 to 1."""
        return sum(each.stretch.steps for each in self.retrained if each.outcome == "proven") / self.steps

    @property
    def whole_seconds(self) -> float | None:
        """How long all stretches would take here, about; None where none was trained."""
        done = [each for each in self.retrained if each.outcome != "damaged"]
        steps = sum(each.stretch.steps for each in done)
        return sum(each.seconds for each in done) / steps * self.steps if steps else None

    def sentence(self) -> str:
        """The answer in one line."""
        worst = next((each for each in self.retrained if each.outcome == self.outcome), None)
        how = with_workers(self.workers)
        if worst is None or self.outcome == "proven":
            chosen = f"{len(self.retrained)} of {counted(self.stretches, 'stretch', 'stretches')}"
            return f"proven: {chosen} ({100 * self.share:.1f} % of the steps) came to the stored bits {how}"
        if self.outcome == "inconclusive":
            return f"INCONCLUSIVE: {worst.stretch} differs in {worst.detail}, on another kind of machine than the run's"
        if self.outcome == "damaged":
            return f"DAMAGED: {worst.stretch}: {worst.detail}"
        return f"DIFFERENT: {worst.stretch} comes to something else {how}, first in {worst.detail}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "run": self.run,
            "outcome": self.outcome,
            "seed": self.seed,
            "workers": self.workers,
            "trained_with": list(self.trained_with),
            "stretches": self.stretches,
            "share": self.share,
            "whole_seconds": self.whole_seconds,
            "machine": list(self.machine),
            "retrained": [
                {**asdict(each.stretch), "outcome": each.outcome, "detail": each.detail, "seconds": each.seconds}
                for each in self.retrained
            ],
        }


def audit(
    run: Run,
    *,
    segments: int = SEGMENTS,
    workers: int | None = None,
    seed: int | None = None,
    root: Path | None = None,
    console: Console | None = None,
) -> Audit:
    """Train stretches of a run again, and compare tensors, predictions and records at every epoch in them.

    Args:
        run: a run that is not running, with `reduction: exact`.
        segments: how many stretches, at random; all where there are fewer.
        workers: 0: in this process; N: that many processes here; None: another number than the run had.
        seed: of the choice; None: one that nobody knows before.
        root: where the run's data lies now; None: where it was.
        console: where progress is shown; None: nowhere.

    Raises:
        UserError: the run is running, has no stored state, or promises nothing (`ddp`); its data is not there; its
            code is not what it wrote; the number of workers does not divide its shards; it needs a GPU.
        RunError: training a stretch has failed.
    """
    config = _config(run, root)
    if config.code:
        provide(config.code, code_of(run.root))
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    there = stretches(run)
    chosen = sorted(random.Random(seed).sample(range(len(there)), min(segments, len(there))))
    records = read_lines(run.epochs_path, EpochRecord.from_json, [])
    trained_with = tuple(sorted({record.world_size for record in records} or {run.meta().get("world_size", 0)}))
    workers = _other_workers(config, trained_with) if workers is None else workers
    tree = config.model_dump(mode="json")
    tree["scaling"]["num_workers"] = workers
    config = parse(tree, ExperimentConfig, "--workers")
    _check_data(run, config)
    words = "in this process" if not workers else f"in {counted(workers, 'process', 'processes')}"
    picked = f"{len(chosen)} of {counted(len(there), 'stretch', 'stretches')} (seed {seed})"
    show(console, f"{run.id}: {picked}, {words}; the run was trained {' and '.join(map(with_workers, trained_with))}")
    done, machine = [], dict[str, None]()
    for number, index in enumerate(chosen, 1):
        found, unlike = _retrain(run, config, there[index], workers, console)
        machine |= dict.fromkeys(unlike)
        done.append(found)
        detail = f": {found.detail}" if found.detail else ""
        show(console, f"[{number}/{len(chosen)}] {found.stretch}: {found.outcome}{detail} ({found.seconds:.1f} s)")
    steps = sum(stretch.steps for stretch in there)
    return Audit(run.id, seed, workers, trained_with, len(there), steps, tuple(done), tuple(machine))


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


def _config(run: Run, root: Path | None) -> ExperimentConfig:
    """The run's configuration, as a stretch of it is trained again."""
    if run.status() == "running":
        raise UserError(f"{run.id}: is still running; audit takes runs that have ended")
    config = run.config()
    if config.reduction != "exact":
        raise UserError(
            f"{run.id}: reduction is {config.reduction}, which promises no equal bits; audit takes runs with exact"
        )
    if run.meta().get("device") == "cuda" and not local.here().gpus:
        raise UserError(f"{run.id}: was trained on a GPU, and this machine has none; audit it on one that has")
    there = config.data.model_copy(update={"root": root.expanduser().resolve()}) if root else config.data
    # Without trackers, and without snapshots inside an epoch; a run from before there was `threads_per_shard` had one.
    every = config.checkpoint.model_copy(update={"every_steps": None, "every_seconds": None})
    threads = config.threads_per_shard or 1
    changes = {"data": there, "checkpoint": every, "threads_per_shard": threads, "tracking": ()}
    return config.model_copy(update=changes).absolute()


def _other_workers(config: ExperimentConfig, trained_with: Sequence[int]) -> int:
    """Another number of workers than the run had: 0 if it had any, else two."""
    if 0 not in trained_with:
        return 0
    return next((n for n in config.allowed_workers if n >= WORKERS and n not in trained_with), 1)


def _check_data(run: Run, config: ExperimentConfig) -> None:
    """Refuse (UserError) other data than the run's."""
    from rayexp import workloads

    wanted = run.data()
    try:
        found = workloads.open_workload(config).describe()
    except UserError as error:
        if config.data.root is not None and not config.data.root.exists():
            raise UserError(
                error, f"; `rayexp audit {run.id} data.root=DIR` takes it from where it lies now"
            ) from error
        raise
    for key in ("train_sha", "val_sha"):
        if wanted.get(key) and wanted[key] != found[key]:
            raise UserError(
                f"data.root: {config.data.root or config.data.name} does not hold the data of {run.id} "
                f"({key} {found[key][:12]}, the run's {wanted[key][:12]})"
            )


# ---------------------------------------------------------------------- one stretch


def _retrain(
    run: Run, config: ExperimentConfig, stretch: Stretch, workers: int, console: Console | None
) -> tuple[Retrained, list[str]]:
    """Train a stretch again, and compare; also in what this machine differs from the run's."""
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
