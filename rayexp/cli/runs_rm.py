"""`rayexp runs rm`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayexp.cli import _complete
from rayexp.cli._app import RUNS, App, JsonOption, RunsOption
from rayexp.cli._output import print_json, print_table, say, tell
from rayexp.display import counted

if TYPE_CHECKING:
    from rayexp.runs.run import Run

rm_app = App(add_completion=False, rich_markup_mode=None)


@rm_app.command("rm")
def rm(
    names: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="The runs to remove.", autocompletion=_complete.runs, show_default=False),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Remove runs with all that they hold. Says what would go and how much, and asks.

    Refused are a run that trains, one outside the folder of runs, and a link. A run of a comparison lies in its
    comparison; `--runs runs/COMPARISON/cells` names those. Nothing goes where one of the RUNs is refused.
    """
    from rayexp.errors import UserError
    from rayexp.runs.removal import disk_use, refuse_removal, remove, sweep_removed
    from rayexp.runs.run import Run

    found = list({run.root: run for run in (Run.locate(name, runs) for name in names)}.values())
    for run in found:
        refuse_removal(run, runs)
    sweep_removed(runs)
    rows = [{"run": run.id, **_about(run), "bytes": disk_use(run.root).total} for run in found]
    if not as_json:
        print_table([{**row, "bytes": _megabytes([row])} for row in rows])
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"removing {_whole(rows)}: there is no terminal to ask on; --yes removes without asking")
        if not typer.confirm(f"Remove {_whole(rows)}?", err=True):
            say("nothing was removed")
            raise typer.Exit(1)
    removed = [row for run, row in zip(found, rows, strict=True) if remove(run, runs)]
    for row in rows:
        if row not in removed:
            say(f"{row['run']}: another process has removed it")
    if as_json:
        print_json(removed)
    else:
        tell(f"removed: {_whole(removed)}")


def _whole(rows: list[dict[str, Any]]) -> str:
    """`2 runs, 101.3 MB`"""
    return f"{counted(len(rows), 'run')}, {_megabytes(rows)}"


def _megabytes(rows: list[dict[str, Any]]) -> str:
    return f"{sum(row['bytes'] for row in rows) / 1e6:,.1f} MB"


def _about(run: Run) -> dict[str, Any]:
    """Status, epochs, and the comparison that a run belongs to."""
    from rayexp.errors import UserError

    try:
        status, epochs = run.status(), len(run.records())
        return {"status": status, "epochs": epochs, "comparison": run.meta().get("parent") or ""}
    except UserError:
        return {"status": "damaged", "epochs": None, "comparison": ""}
