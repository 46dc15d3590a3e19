"""`rayexp quickstart`: the whole tour offline, by the same commands that a user types."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayexp.cli._app import RUNS, app, folder
from rayexp.cli._output import say

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
    from rayexp.cli.compare import compare, report
    from rayexp.cli.generate import generate
    from rayexp.cli.summary import summary
    from rayexp.config import shipped

    began = time.monotonic()
    images, text, grid = (shipped(f"{n}.yaml") for n in ("quickstart", "quickstart_language", "quickstart_devices"))
    runs = runs.resolve()

    _chapter(1, "The model, layer by layer", f"rayexp summary {_short(images)}")
    summary(images, depth=1)

    _chapter(2, "Train in this process", f"rayexp train {_short(images)}")
    run = _train(images, runs)
    last = run.epochs()[-1]

    _chapter(3, "Which judgements changed?", f"rayexp diff {run.id}@1 @{last} --html diff.html")
    page = run.root / "diff.html"
    _diff(f"{run.root}@1", f"{run.root}@{last}", page, runs)

    _chapter(4, "A language model on the same engine", f"rayexp train {_short(text)}")
    language = _train(text, runs)
    say(f"$ rayexp generate {language.id}@last --words 40")
    generate(f"{language.root}@last", words=40, runs=runs)

    _chapter(5, "How much faster on more devices, and is it the same model?", f"rayexp compare {_short(grid)}")
    compare(str(grid), runs=runs)

    _chapter(6, "One page about the run", f"rayexp report {run.id}")
    report(str(run.root), runs=runs)

    devices = max(runs.glob("*-quickstart-devices-*/report.html"))
    say(f"\nThe tour took {time.monotonic() - began:.0f} s. Open in a browser:")
    say(f"  {run.root / 'report.html'}\n      the run; it links to its diff page, epoch 1 against epoch {last}")
    say(f"  {devices}\n      the device grid")
    say(f"Next: rayexp runs --runs {runs}; tensorboard --logdir {runs}; README for real data")


def _train(config: Path, runs: Path) -> Run:
    from rich.console import Console

    from rayexp.config import load
    from rayexp.launch.driver import run

    return run(load(config, [f"storage_path={runs}"]), argv=sys.argv, console=Console(stderr=True))


def _diff(a: str, b: str, page: Path, runs: Path) -> None:
    from rayexp.cli.diff import diff

    try:
        diff([a, b], html=page, limit=5, runs=runs)
    except typer.Exit as done:
        if done.exit_code:
            raise


def _short(config: Path) -> str:
    """As typed from a checkout."""
    return f"configs/{config.name}"


def _chapter(number: int, title: str, command: str) -> None:
    line = f"{number}/{CHAPTERS}  {title}"
    print("\n" + (f"\033[1m{line}\033[0m" if sys.stderr.isatty() else line), file=sys.stderr, flush=True)
    say(f"$ {command}")
