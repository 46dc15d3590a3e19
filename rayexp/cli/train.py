"""`rayexp train`, `rayexp verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayexp.cli._shell import RUNS, JsonOption, app, print_json, print_table, say, tell

if TYPE_CHECKING:
    from rayexp.config import ExperimentConfig
    from rayexp.runs.run import Run

Words = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Join this Ray. [default: RAY_ADDRESS, else one that runs here, else a new one]",
        show_default=False,
    ),
]


@app.command()
def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG", help="YAML of the experiment; a run's config.yaml repeats the run.", show_default=False
        ),
    ] = None,
    overrides: Words = None,
    runs: Annotated[
        Path | None, typer.Option("--runs", help="Make the run directory in there. [default: storage_path]")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="N", help="The run's name.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with this run at its exact step.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the configuration and the plan only.")] = False,
    address: Address = None,
    as_json: JsonOption = False,
) -> None:
    """Train: in this process (scaling.num_workers=0, the default), or on Ray (1 to 8; [1,8] is elastic).

    Ctrl-C saves after the present step and exits with 130; so does SIGTERM (143), SIGUSR1, a batch system's notice
    (138), and the closing of the terminal (129; not under nohup). --resume goes on from there, with as many workers as
    you like; CONFIG may then be left out.
    """
    run, settled = _settle(config, overrides or [], runs, name, resume)
    if dry_run:
        _show_plan(settled, address, as_json)
        return
    from rich.console import Console

    from rayexp.launch.driver import run as start
    from rayexp.system.clock import process_began

    made = start(
        settled, argv=sys.argv, resume=run, address=address, console=Console(stderr=True), started=process_began()
    )
    if as_json:
        print_json({**made.meta(), "path": str(made.root), "epochs": [r.to_json() for r in made.records()]})
    else:
        tell(str(made.root))


@app.command()
def verify(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML of the experiment.", show_default=False)],
    overrides: Words = None,
    workers: Annotated[
        str, typer.Option(metavar="N,N...", help="Worker counts; the first is the reference.")
    ] = "0,1,2,4",
    steps: Annotated[int, typer.Option(metavar="K", min=2, help="Steps to compare.")] = 10,
    kill: Annotated[bool, typer.Option("--kill", help="Also SIGKILL a worker of a further run half way.")] = False,
    launcher: Annotated[str, typer.Option(metavar="ray|processes", help="How workers are started.")] = "ray",
    contrast: Annotated[bool, typer.Option("--contrast/--no-contrast", help="Also run reduction=ddp.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Prove that the number of workers changes no bit, or name the first step and tensor that differ.

    Exits with 0 where all are equal, else with 1. `price` is how much faster plain ddp is on as many workers.
    """
    from rich.console import Console

    from rayexp.config import load
    from rayexp.errors import UserError

    if launcher not in ("ray", "processes"):
        raise UserError(f"--launcher: {launcher!r} is not one of ray, processes")
    counts = workers.split(",")
    if not all(count.strip().isdecimal() for count in counts):
        raise UserError(f"--workers: expected numbers with commas between, as 0,1,2,4; got {workers!r}")
    settled = load(config, overrides or [])

    from rayexp.launch.verify import verify as compare

    console = Console(stderr=True)
    verdict = compare(
        settled,
        [int(count) for count in counts],
        steps=steps,
        kill=kill,
        launcher=launcher,  # type: ignore[arg-type]
        contrast=contrast,
        say=lambda text: console.print(text, highlight=False, markup=False),
        console=console,
    )
    if as_json:
        print_json(verdict.to_json())
    else:
        print_table(verdict.rows())
        if verdict.contrast:
            different = len({trial.weights for trial in verdict.contrast})
            tell(f"ddp: {different} different weights at {len(verdict.contrast)} counts")
        tell(verdict.sentence())
    raise typer.Exit(0 if verdict.ok else 1)


def _settle(
    config: str | None, words: list[str], runs: Path | None, name: str | None, resume: str | None
) -> tuple[Run | None, ExperimentConfig]:
    """The run to go on with, if any, and the configuration."""
    from rayexp.cluster.job_context import resolve_path, resolve_paths
    from rayexp.config import load, read
    from rayexp.errors import UserError
    from rayexp.runs.run import Run

    if resume and config and "=" in config and not Path(config).exists():
        words = [config, *words]
        config = None
    words = [*words, *([f"storage_path={runs}"] if runs else []), *([f"name={name}"] if name else [])]
    if config is None:
        if not resume:
            raise UserError("train needs a CONFIG (or --resume RUN)")
        run = Run.find(resume, resolve_path(runs or RUNS))
        return run, read(run.config_path, words)
    settled = resolve_paths(load(config, words))
    return Run.find(resume, settled.storage_path) if resume else None, settled


def _show_plan(config: ExperimentConfig, address: str | None, as_json: bool) -> None:
    from rayexp.launch.driver import outline

    plan = outline(config, address)
    if as_json:
        print_json({"config": config.model_dump(mode="json"), "plan": plan})
        return
    for warning in plan.pop("warnings"):
        say(f"warning: {warning}")
    tell(config.to_yaml())
    print_table([{"plan": key, "": value} for key, value in plan.items()])
