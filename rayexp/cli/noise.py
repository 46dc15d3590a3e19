"""`rayexp noise`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rayexp.cli._app import ConfigArgument, JsonOption, OverridesArgument, RayOption, app, folder
from rayexp.cli._output import print_json, tell


@app.command(short_help="Measure how much another seed changes.")
def noise(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    seeds: Annotated[
        int, typer.Option(metavar="N", min=2, help="How many; from three on, intervals can be given.")
    ] = 3,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Train for fewer epochs than CONFIG says.")
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            "--runs", metavar="DIR", parser=folder, help="Make the run directories in there. [default: storage_path]"
        ),
    ] = None,
    address: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train CONFIG with several seeds, compare every two of them, and store what they change.

    `rayexp diff` of runs with this configuration finds the file in DIR/noise and says whether their difference is more
    than reseeding changes. Runs that are there already are taken; one that was stopped goes on. With --epochs the floor
    is that of shorter runs, and `diff` says so.
    """
    from rich.console import Console

    from rayexp.cluster.job_context import resolve_paths
    from rayexp.config import load

    more = [*([f"epochs={epochs}"] if epochs else []), *([f"storage_path={runs}"] if runs else [])]
    experiment = resolve_paths(load(config, [*(overrides or []), *more])).absolute()

    from rayexp.launch.noise import train_seeds

    made = train_seeds(experiment, seeds, argv=sys.argv, address=address, console=Console(stderr=True))

    from rayexp.cli._diff_more import show_floor
    from rayexp.diff.floors import measured, store

    floors = measured(made)
    path = store(made[0], floors)
    if as_json:
        print_json({"path": str(path), "floors": [floor.to_json() for floor in floors]})
        return
    show_floor(floors[-1], "acc1" if floors[-1].kind == "images" else "mean loss")
    tell(str(path))
