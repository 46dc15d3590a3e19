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
    sizes = [disk_use(run.root).total for run in found]
    rows = [{"run": run.id, **_about(run), "bytes": size} for run, size in zip(found, sizes, strict=True)]
    whole = f"{counted(len(rows), 'run')}, {sum(sizes) / 1e6:,.1f} MB"
    if not as_json:
        print_table([{**row, "bytes": f"{size / 1e6:,.1f} MB"} for row, size in zip(rows, sizes, strict=True)])
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"removing {whole}: there is no terminal to ask on; --yes removes without asking")
        if not typer.confirm(f"Remove {whole}?", err=True):
            say("nothing was removed")
            raise typer.Exit(1)
    for run in found:
        remove(run, runs)
    if as_json:
        print_json(rows)
    else:
        tell(f"removed: {whole}")


def _about(run: Run) -> dict[str, Any]:
    """Status, epochs, and the comparison that a run belongs to."""
    from rayexp.errors import UserError

    try:
        status, epochs = run.status(), len(run.records())
        return {"status": status, "epochs": epochs, "comparison": run.meta().get("parent") or ""}
    except UserError:
        return {"status": "damaged", "epochs": None, "comparison": ""}
