"""Runs: train one, prove that the number of workers changes no bit, compare devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayexp.config import CompareConfig, ExperimentConfig
from rayexp.errors import UserError
from rayexp.library import configs
from rayexp.library.configs import Config, Overrides
from rayexp.library.guest import console, guest
from rayexp.library.parts import refuse_for_workers, with_parts
from rayexp.runs.run import Run

if TYPE_CHECKING:
    from rayexp.grid.report import CompareReport
    from rayexp.launch.verify import Verdict

RUNS = "runs"


def train(
    config: Config | None = None,
    overrides: Overrides = (),
    *,
    model: Any = None,
    data: Any = None,
    callbacks: Sequence[object] = (),
    resume: Run | str | None = None,
    runs: str | PathLike[str] | None = None,
    address: str | None = None,
    progress: bool = True,
) -> Run:
    """Train, in this process or on Ray workers, as `rayexp train` does; return the finished run.

    Ctrl-C saves after the present step, and then raises `Stopped`, which is a KeyboardInterrupt: go on with `resume`.
    (Outside the main thread there is no Ctrl-C, and no signal is handled.)

    Args:
        config: a YAML file, a shipped name, a dict or an ExperimentConfig; with `resume` it may be left out.
        overrides: keys to set, `{"epochs": 3, "scaling.num_workers": 2}` or `["epochs=3"]`.
        model: a class or a function that makes a model, yours or a library's; it stands for `model.name`, and the other
            keys of `model` are its options (docs/your-own-model.md). Workers, and whoever opens the run later, import
            it from its file, so what is defined in a notebook or in the script itself trains in this process only.
        data: the same for a dataset, and `data.name`.
        callbacks: objects with any of the methods `on_epoch(record)`, called with the EpochRecord of every epoch, and
            `on_step(progress)`, called a few times a second with a dict of `epoch`, `epochs`, `step`, `steps`, `loss`
            (nats), `rate` (samples a second) and `unit`. They are called one at a time in a thread of this process. An
            error in one lets the run save and stop.
        resume: a run, or its name, to go on with at its exact step.
        runs: the folder in which the run directory is made, or the run to resume lies; None: `storage_path`.
        address: of a running Ray; None: RAY_ADDRESS, one that was started here, else a new one. A Ray that this process
            is connected to is used, and stays connected.
        progress: show a bar (on a terminal) and a line for every epoch on stderr.

    Raises:
        UserError: the configuration, the data or the machine does not allow it; nothing is left of the run.
        RunError: training failed, or a callback raised an error; the line says how to go on.
        Stopped: Ctrl-C, or another signal that asks to stop.

    Example:
        >>> import rayexp
        >>> run = rayexp.train("quickstart", {"epochs": 1, "data.max_train_samples": 128}, runs=tmp, progress=False)
        >>> run.status(), run.records()[0].epoch
        ('done', 1)
    """
    from rayexp.launch.driver import run as drive

    with guest("train"):
        resumed, experiment = _begin(config, with_parts(overrides, model=model, data=data), resume, runs)
        refuse_for_workers(experiment)
        return drive(
            experiment,
            argv=[f"rayexp.train({str(config)!r})" if isinstance(config, str | PathLike) else "rayexp.train()"],
            resume=resumed,
            address=address,
            console=console(progress),
            callbacks=callbacks,
            guest=True,
        )


def _begin(
    config: Config | None, overrides: Overrides, resume: Run | str | None, runs: str | PathLike[str] | None
) -> tuple[Run | None, ExperimentConfig]:
    """The run to go on with, if any, and the configuration."""
    if config is None and resume is None:
        raise UserError("train: needs a config, or a run to resume")
    experiment = None
    if config is not None:
        experiment = configs.load_config(config, overrides)
        if runs is not None:
            experiment = experiment.model_copy(update={"storage_path": Path(runs)})
    if resume is None:
        assert experiment is not None
        return None, experiment
    if isinstance(resume, Run):
        run = resume
    else:
        run = Run.find(resume, Path(runs or (experiment.storage_path if experiment else RUNS)))
    experiment = experiment or configs.load_config(run.config(), overrides)
    if config is not None or any(word.startswith("model.weights=") for word in configs.words(overrides)):
        from rayexp.launch.starting import refuse_changed

        refuse_changed(run, experiment)
    return run, experiment


def verify(
    config: Config,
    overrides: Overrides = (),
    *,
    workers: Sequence[int] = (0, 1, 2, 4),
    steps: int = 10,
    kill: bool = False,
    launcher: Literal["ray", "processes"] = "ray",
    contrast: bool = True,
    progress: bool = True,
) -> Verdict:
    """Train the same steps at several numbers of workers, and compare every tensor after every step.

    Args:
        config, overrides: as for `train`.
        workers: two or more; the first is the reference. 0 or divisors of `shards`.
        steps: how many steps to compare, at least 2.
        kill: also SIGKILL a worker of a further run half way, and let it go on.
        launcher: how workers are started; `processes` needs no Ray.
        contrast: also run `reduction: ddp`, for the price of exactness.
        progress: show a line for every trial on stderr.

    Returns:
        A Verdict: `ok`, `sentence()`, `rows()`, `differences` (the first step and tensor of each trial that differs),
        and `to_dict()`.

    Raises:
        UserError: a number of workers is not allowed, or the configuration is wrong.
        RunError: a trial failed.

    Example:
        >>> verdict = rayexp.verify("quickstart", workers=[0, 2])  # doctest: +SKIP
        >>> verdict.ok  # doctest: +SKIP
        True
    """
    from rayexp.launch.verify import verify as compare_counts

    with guest("verify"):
        return compare_counts(
            configs.load_config(config, overrides),
            list(workers),
            steps=steps,
            kill=kill,
            launcher=launcher,
            contrast=contrast,
            console=console(progress),
            guest=True,
        )


def compare(
    config: str | PathLike[str] | Mapping[str, Any] | CompareConfig,
    overrides: Overrides = (),
    *,
    resume: str | PathLike[str] | None = None,
    runs: str | PathLike[str] | None = None,
    address: str | None = None,
    progress: bool = True,
) -> CompareReport:
    """Run a device grid under Ray Tune, as `rayexp compare` does, and return its report.

    Args:
        config: a YAML file, a shipped name (`devices`), a dict or a CompareConfig. `base` of a dict is looked up from
            the working directory.
        overrides: keys of the grid to set.
        resume: a comparison to go on with, by name or path; `config` is then not read.
        runs: the folder in which the comparison's directory is made, or lies; None: `storage_path`.
        address: as for `train`.
        progress: show progress on stderr.

    Returns:
        A CompareReport: `cells` with rates, speed-up and intervals, `skipped` cells and `failed` repeats,
        `equal` (whether exact cells ended with the same weights), and `to_dict()`.

    Raises:
        UserError: the grid or its base is wrong, or no cell can run here.
        KeyboardInterrupt: Ctrl-C; what is done stays, for `resume`.

    Example:
        >>> report = rayexp.compare("devices")  # doctest: +SKIP
        >>> [(row.cell.id, row.speedup) for row in report.cells]  # doctest: +SKIP
    """
    from rayexp.grid import run as grid
    from rayexp.grid.comparison import Comparison
    from rayexp.grid.report import read_report

    with guest("compare"):
        if resume is not None:
            made = Comparison.find(str(resume), Path(runs or RUNS))
        else:
            planned = configs.read(config, overrides, CompareConfig)
            if runs is not None:
                planned = planned.model_copy(update={"storage_path": Path(runs)})
            base, cells = grid.planned(planned, configs.folder_of(config), address)
            made = grid.start(planned, base, cells, argv=["rayexp.compare()"])
        grid.go(made, address=address, console=console(progress), guest=True)
        return read_report(made)
