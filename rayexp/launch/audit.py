"""Audit a finished run: train random stretches of it again, and compare what comes out with what is stored.

A stretch lies between two neighbouring stored states; the first begins at the initial weights. It is trained again from
the stored state at its beginning, with another number of workers, and must come to the same bits. Nothing but the run
directory and the data is needed, and nothing is written into the run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayexp.config import ExperimentConfig, parse
from rayexp.config.references import provide
from rayexp.display import counted, with_workers
from rayexp.errors import UserError
from rayexp.launch import local
from rayexp.launch.screen import show
from rayexp.launch.stretch import Outcome, Retrained, retrain, stretches
from rayexp.runs.code import code_of
from rayexp.runs.records import EpochRecord, read_lines
from rayexp.runs.run import Run

if TYPE_CHECKING:
    from rich.console import Console

SEGMENTS = 3
WORKERS = 2  # where the run was trained in one process


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
        found, unlike = retrain(run, config, there[index], workers, console)
        machine |= dict.fromkeys(unlike)
        done.append(found)
        detail = f": {found.detail}" if found.detail else ""
        show(console, f"[{number}/{len(chosen)}] {found.stretch}: {found.outcome}{detail} ({found.seconds:.1f} s)")
    steps = sum(stretch.steps for stretch in there)
    return Audit(run.id, seed, workers, trained_with, len(there), steps, tuple(done), tuple(machine))


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
