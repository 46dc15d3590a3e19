"""Train one configuration with several seeds, so that what a reseed changes can be told from what a change does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayexp.config import ExperimentConfig
from rayexp.config.identity import identity
from rayexp.display import counted
from rayexp.errors import UserError
from rayexp.launch.driver import run as train
from rayexp.launch.screen import show
from rayexp.runs.integrity import is_finished
from rayexp.runs.run import Run

if TYPE_CHECKING:
    from rich.console import Console

LONGEST = 48  # characters of the configuration's name in those of the runs
MOST = 2**63  # seeds are below


def train_seeds(
    config: ExperimentConfig,
    count: int,
    *,
    argv: Sequence[str],
    address: str | None = None,
    console: Console | None = None,
) -> list[Run]:
    """Runs of the configuration with the seeds `seed`, `seed + 1`, ..., all finished.

    Those that lie in `storage_path` already are taken, or gone on with where they are not finished; so a command that
    was stopped is given once more.

    Args:
        config: what to train; `seed` is the first one.
        count: of seeds.
        argv, address, console: see `driver.run`.

    Raises:
        UserError, RunError, Stopped: see `driver.run`.
    """
    if config.seed + count > MOST:
        raise UserError(f"seed: {config.seed} leaves no room for {count} seeds below 2**63")
    wanted = [
        config.model_copy(update={"seed": config.seed + i, "name": f"{config.name[:LONGEST]}-seed{config.seed + i}"})
        for i in range(count)
    ]
    known = {c.seed: _known(c) for c in wanted}
    done = sum(run is not None and is_finished(run, run.config()) for run in known.values())
    show(console, announced(config, count, done))
    made = []
    for c in wanted:
        run = known[c.seed]
        if run is not None and not is_finished(run, run.config()):
            run = train(run.config(), argv=argv, resume=run, address=address, console=console)
        made.append(run or train(c, argv=argv, address=address, console=console))
    return made


def announced(config: ExperimentConfig, count: int, done: int) -> str:
    """`3 seeds of resnet, 20 epochs each; 1 of them is trained already`."""
    line = f"{counted(count, 'seed')} of {config.name}, {counted(config.epochs, 'epoch')} each"
    return f"{line}; {done} of them {'is' if done == 1 else 'are'} trained already" if done else line


def _known(config: ExperimentConfig) -> Run | None:
    """A run of this configuration with this seed: a finished one, else the newest that can be gone on with."""
    found: Run | None = None
    for run in Run.readable(config.storage_path):
        try:
            its = run.config()
        except UserError:
            continue
        if config.precision == "auto":  # which a run decides
            its = its.model_copy(update={"precision": "auto"})
        if (its.seed, its.epochs) == (config.seed, config.epochs) and identity(its) == identity(config):
            if is_finished(run, its):
                return run
            if run.status() in ("stopped", "died", "failed"):
                found = run
    return found
