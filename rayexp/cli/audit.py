"""`rayexp audit`."""

from __future__ import annotations

from typing import Annotated

import typer

from rayexp.cli import _complete
from rayexp.cli._app import RUNS, JsonOption, RunsOption, app, moved_data
from rayexp.cli._output import print_json, print_table, tell

CODES = {"proven": 0, "differs": 1, "damaged": 1, "inconclusive": 3}


@app.command(short_help="Prove a finished run: train parts of it again.")
def audit(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", autocompletion=_complete.runs, help="A run that has ended.", show_default=False),
    ],
    moved: Annotated[
        list[str] | None,
        typer.Argument(metavar="[data.root=DIR]", help="Where the run's data lies now.", show_default=False),
    ] = None,
    segments: Annotated[int, typer.Option("--segments", metavar="K", min=1, help="How many stretches.")] = 3,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            min=0,
            help="Processes to train with; 0: this one. [default: 0 if the run had workers, else 2]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="S", min=0, help="Of the choice. [default: random]", show_default=False),
    ] = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Train random stretches of a finished run again, with another number of workers, and compare all that is stored.

    A stretch lies between two stored states, or the initial weights and the first. Needs the run directory and the
    data, writes nothing into the run. Exits with 0 where all chosen stretches came to the stored bits, 1 where one
    differs or is damaged, and 3 where one differs on another kind of machine than the run's.
    """
    from rich.console import Console

    from rayexp.display import seconds
    from rayexp.launch.audit import audit as retrain
    from rayexp.runs.run import Run

    root = moved_data(moved or [], "audit")
    found = retrain(
        Run.find(run, runs), segments=segments, workers=workers, seed=seed, root=root, console=Console(stderr=True)
    )
    if as_json:
        print_json(found.to_json())
        raise typer.Exit(CODES[found.outcome])
    print_table(
        [
            {
                "stretch": str(each.stretch),
                "steps": each.stretch.steps,
                "outcome": each.outcome,
                "seconds": round(each.seconds, 1),
                "first difference": each.detail,
            }
            for each in found.retrained
        ]
    )
    if found.machine:
        tell(f"this machine differs from the run's: {', '.join(found.machine)}; equal bits are a proof all the same")
    tell(found.sentence())
    if found.whole_seconds is not None and len(found.retrained) < found.stretches:
        tell(f"all {found.stretches} would take about {seconds(found.whole_seconds)} here (seed {found.seed})")
    raise typer.Exit(CODES[found.outcome])
