"""`rayexp train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayexp.cli import _complete
from rayexp.cli._app import BEGAN, RUNS, JsonOption, OverridesArgument, RayOption, app, folder
from rayexp.cli._output import print_json, print_table, say, tell

if TYPE_CHECKING:
    from rayexp.config import ExperimentConfig
    from rayexp.runs.run import Run


@app.command(short_help="Train, in this process or on Ray workers; or go on with a run.")
def train(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML of the experiment, or a name that `rayexp configs` lists; a run's config.yaml repeats the run.",
            autocompletion=_complete.configs,
            show_default=False,
        ),
    ] = None,
    overrides: OverridesArgument = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            "--runs", metavar="DIR", parser=folder, help="Make the run directory in there. [default: storage_path]"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="N", help="The run's name.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", autocompletion=_complete.runs, help="Go on with this run at its exact step."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the configuration and the plan only.")] = False,
    address: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train: in this process (scaling.num_workers=0, the default), or on Ray (1 to 8; [1,8] is elastic).

    Ctrl-C saves after the present step and exits with 130; so does SIGTERM (143), SIGUSR1, a batch system's notice
    (138), and the closing of the terminal (129; not under nohup). --resume goes on from there, with as many workers as
    you like; CONFIG may then be left out. A finished run is trained on by `--resume RUN epochs=N`, unless its schedule
    is cosine or onecycle.
    """
    run, experiment = _configure(config, overrides or [], runs, name, resume)
    if run is not None and (config or any(word.startswith("model.weights=") for word in overrides or ())):
        from rayexp.launch.starting import refuse_changed

        refuse_changed(run, experiment)
    if dry_run:
        _show_plan(experiment, address, run, as_json)
        return
    from rich.console import Console

    from rayexp.launch.driver import run as start
    from rayexp.system.clock import process_began

    began = context.meta.get(BEGAN) or process_began()
    made = start(experiment, argv=sys.argv, resume=run, address=address, console=Console(stderr=True), started=began)
    if as_json:
        print_json({**made.meta(), "path": str(made.root), "epochs": [r.to_json() for r in made.records()]})
    else:
        tell(str(made.root))


def _configure(
    config: str | None, overrides: list[str], runs: Path | None, name: str | None, resume: str | None
) -> tuple[Run | None, ExperimentConfig]:
    """The run to go on with, if any, and the configuration."""
    from rayexp.cluster.job_context import resolve_path, resolve_paths
    from rayexp.config import load, read
    from rayexp.errors import UserError
    from rayexp.runs.run import Run

    if resume and config and "=" in config and not Path(config).exists():
        overrides = [config, *overrides]
        config = None
    overrides = [*overrides, *([f"storage_path={runs}"] if runs else []), *([f"name={name}"] if name else [])]
    if config is None:
        if not resume:
            raise UserError("train needs a CONFIG (or --resume RUN)")
        run = Run.find(resume, resolve_path(runs or RUNS))
        return run, read(run.config_path, overrides)
    experiment = resolve_paths(load(config, overrides))
    return Run.find(resume, experiment.storage_path) if resume else None, experiment


def _show_plan(config: ExperimentConfig, address: str | None, resume: Run | None, as_json: bool) -> None:
    from rayexp.launch.driver import outline

    plan = outline(config, address, resume)
    if as_json:
        print_json({"config": config.model_dump(mode="json"), "plan": plan})
        return
    for warning in plan.pop("warnings"):
        say(f"warning: {warning}")
    tell(config.to_yaml())
    print_table([{"plan": key, "": value} for key, value in plan.items()])
