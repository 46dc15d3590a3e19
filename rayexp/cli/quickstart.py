"""`rayexp quickstart`: the whole tour offline, by the same commands that a user types."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayexp.cli._app import BEGAN, RUNS, app, folder
from rayexp.cli._output import say, styled

if TYPE_CHECKING:
    from rayexp.runs.run import Run

CHAPTERS = 6


@app.command()
def quickstart(
    runs: Annotated[
        Path, typer.Option("--runs", metavar="DIR", parser=folder, help="Folder for the tour's runs.")
    ] = RUNS,
) -> None:
    """The tour: train, diff, a language model, the device grid. Offline, about three minutes on two cores.

    It draws its own images and takes its text from Python; nothing is downloaded.
    """
    from rayexp.config import shipped
    from rayexp.launch.resuming import here

    began = time.monotonic()
    images, text, grid = (
        str(here(shipped(f"{n}.yaml"))) for n in ("quickstart", "quickstart_language", "quickstart_devices")
    )
    where = [] if runs.resolve() == RUNS.resolve() else ["--runs", str(here(runs))]

    _chapter(1, "The model, layer by layer")
    _do("summary", images, "--depth", "1")

    _chapter(2, "Train in this process")
    run = _new(runs, lambda: _do("train", images, *where))
    last = run.epochs()[-1]

    _chapter(3, "Which judgements changed from the first epoch to the last?")
    page = here(run.root) / "diff.html"
    _do("diff", f"{run.id}@1", f"@{last}", "--limit", "5", "--html", str(page), *where)

    _chapter(4, "A language model on the same engine")
    language = _new(runs, lambda: _do("train", text, *where))
    _do("generate", f"{language.id}@last", "--words", "40", *where)

    _chapter(5, "How much faster on more devices, and is it the same model?")
    _do("compare", grid, *where)

    _chapter(6, "A page about each run")
    _do("report", run.id, *where)
    _do("report", language.id, *where)

    devices = max(runs.resolve().glob("*-quickstart-devices-*/report.html"))
    say(f"\nThe tour took {time.monotonic() - began:.0f} s. Open in a browser:")
    for opened, words in (
        (run.root / "report.html", "the image model: its curves, and what it is wrong about"),
        (page, f"what it learned from epoch 1 to epoch {last}, image by image"),
        (language.root / "report.html", "the language model: its curves, and a text that it writes"),
        (devices, "the device grid: rates, and equal weights"),
    ):
        say(f"  {opened.resolve()}\n      {words}")
    say("Try next (README.md goes on with your own images, your own text, and clusters):")
    for words, command in (
        ("a better image model", ["rayexp", "train", images, "epochs=10", "name=longer", *where]),
        ("the same weights, whatever happens", ["rayexp", "verify", images, "--workers", "0,1,2", "--kill"]),
        ("all that was trained here", ["rayexp", "runs", *where]),
        ("all curves beside each other", ["tensorboard", "--logdir", str(here(runs))]),
    ):
        say(f"  {shlex.join(command)}\n      {words}")


def _do(*words: str) -> None:
    """Print a command and do it: what is printed, copied and typed here, does the same. Its start-up is counted from
    here, not from that of the tour."""
    say(f"$ {shlex.join(['rayexp', *words])}")
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    try:
        with command.make_context(f"rayexp {words[0]}", list(words[1:])) as context:
            context.meta[BEGAN] = time.monotonic()
            command.invoke(context)
    except typer.Exit as done:
        if done.exit_code:
            raise


def _new(runs: Path, make: Callable[[], None]) -> Run:
    """The run that `make` adds to the folder."""
    from rayexp.runs.run import Run

    known = {run.id for run in Run.all(runs)}
    make()
    return next(run for run in Run.all(runs) if run.id not in known)


def _chapter(number: int, title: str) -> None:
    line = f"{number}/{CHAPTERS}  {title}"
    print(f"\n{styled(line, 1, sys.stderr)}", file=sys.stderr, flush=True)
