"""`rayexp evaluate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rayexp.cli import _complete
from rayexp.cli._app import RUNS, JsonOption, RunsOption, app, moved_data
from rayexp.cli._output import print_json, say, tell, terminal_width


@app.command(short_help="Judge the validation data with a checkpoint.")
def evaluate(
    ref: Annotated[
        str,
        typer.Argument(metavar="RUN@EPOCH", autocompletion=_complete.runs, help="RUN@7, RUN@best, RUN@last."),
    ],
    moved: Annotated[
        list[str] | None,
        typer.Argument(metavar="[data.root=DIR]", help="Where the run's data lies now.", show_default=False),
    ] = None,
    mirror: Annotated[
        bool,
        typer.Option("--mirror", help="Average over each image and its mirror image; the result is not stored."),
    ] = False,
    print_freq: Annotated[int, typer.Option("--print-freq", metavar="N", min=1, help="A line every N batches.")] = 10,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Judge the validation data with a checkpoint, in the words of pytorch/examples' imagenet/main.py.

    Predictions that the run lacks are stored; those that it has are compared. Data that has moved is the run's own
    where its hash is. With --mirror the probabilities are the mean over an image and its mirror image, the output says
    so, and nothing is stored.
    """
    from rayexp.cli._progress import Progress, summary
    from rayexp.runs.run import resolve

    root = moved_data(moved or [], "evaluate")
    run, epoch = resolve(ref, runs)
    say(f"judging with {run.id}@{epoch}")

    from rayexp.launch.evaluate import evaluate

    progress = Progress(print_freq, terminal_width(sys.stdout), "Test mirrored" if mirror else "Test")
    found = evaluate(run, epoch, progress.begin, None if as_json else progress.seen, root, mirror)
    if as_json:
        print_json(
            {
                "run": run.id,
                "epoch": epoch,
                "n": len(found.predictions),
                "not_finite": found.not_finite,
                **found.metrics,
                "mirrored": found.mirrored,
                "weights_sha": found.weights_sha,
                "predictions": None if found.mirrored else str(run.predictions_path(epoch)),
                "stored": found.stored,
                "equal": found.equal,
            }
        )
        return
    tell(summary(found.metrics) + " (mirrored)" * found.mirrored)
    if found.not_finite:
        say(f"NOT FINITE: the model's output for {found.not_finite:,} of {len(found.predictions):,} samples")
    if found.stored:
        say(f"predictions: {run.predictions_path(epoch)}")
    elif found.equal is False:
        say(
            "these differ from the predictions that training stored: another device or other versions round differently"
        )
