"""`rayexp verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from rayexp.cli._app import ConfigArgument, JsonOption, OverridesArgument, app
from rayexp.cli._output import print_json, print_table, tell
from rayexp.display import counted, short


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

    verdict = compare(
        experiment,
        [int(count) for count in counts],
        steps=steps,
        kill=kill,
        launcher=launcher,  # type: ignore[arg-type]
        contrast=contrast,
        console=Console(stderr=True),
    )
    if as_json:
        print_json(verdict.to_json())
    else:
        hashes = ("weights", "ddp weights")
        print_table(
            [{k: short(v or "") if k in hashes else v for k, v in row.items()} for row in verdict.rows()],
            drop=("ddp weights", f"ddp {verdict.unit}/s"),
        )
        if verdict.contrast:
            different = len({trial.weights for trial in verdict.contrast})
            shown = "the same weights" if different == 1 else f"{different} different weights"
            tell(f"ddp: {shown} at {counted(len(verdict.contrast), 'number of workers', 'numbers of workers')}")
        tell(verdict.sentence())
    raise typer.Exit(0 if verdict.ok else 1)
