"""`rayexp verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from rayexp.cli._app import ConfigArgument, JsonOption, OverridesArgument, app
from rayexp.cli._output import print_json, print_table, tell


@app.command(short_help="Prove that the number of workers changes no bit.")
def verify(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
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
    experiment = load(config, overrides or [])

    from rayexp.launch.verify import verify as compare

    console = Console(stderr=True)
    verdict = compare(
        experiment,
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
