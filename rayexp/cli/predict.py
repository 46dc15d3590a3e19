"""`rayexp predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayexp.cli import _complete
from rayexp.cli._app import RUNS, JsonOption, RunsOption, app
from rayexp.cli._output import print_json, print_table, say, tell

if TYPE_CHECKING:
    from rayexp.launch.predict import Answers


@app.command(short_help="Ask a checkpoint about your pictures, or about lines of text.")
def predict(
    ref: Annotated[
        str,
        typer.Argument(metavar="RUN@EPOCH", autocompletion=_complete.runs, help="RUN@7, RUN@best, RUN@last."),
    ],
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILES|DIR", help="Pictures, or folders of them; for a language model text files."),
    ],
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the answers here, too.", dir_okay=False)
    ] = None,
    top: Annotated[int, typer.Option(metavar="K", min=1, help="Classes of each picture.")] = 5,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Ask a checkpoint about your pictures: classes and confidences. A language model says how likely each line is.

    Pictures are decoded, resized and cropped as the run's own. Lines of a text are judged one by one; words that the
    model does not know are counted. Files that cannot be read are named and left out, and the exit code is then 1.
    """
    from rayexp.runs.run import resolve

    run, epoch = resolve(ref, runs)

    from rayexp.launch import predict as asking

    if run.kind() == "tokens":
        sources, bad = asking.lines(files)
    else:
        sources, bad = asking.pictures(files), []
    answers = asking.predict(run, epoch, sources, top)
    unreadable = [*bad, *answers.unreadable]
    if csv:
        from rayexp.system.disk import write_atomic

        write_atomic(csv, answers.to_csv())
        say(f"answers: {csv}")
    if as_json:
        listed = [{"name": name, "why": why} for name, why in unreadable]
        print_json({**answers.to_dict(), "unreadable": listed})
    elif answers.categories:
        _show_pictures(answers)
    else:
        _show_lines(answers)
    for name, why in unreadable:
        say(f"{name}: left out, it cannot be read ({why})")
    raise typer.Exit(1 if unreadable else 0)


def _show_pictures(answers: Answers) -> None:
    from rayexp.launch.predict import PicturePrediction

    rows = []
    for row in answers:
        assert isinstance(row, PicturePrediction)
        pairs = [f"{answers.words(c)} {100 * p:.1f} %" for c, p in zip(row.classes, row.confidences, strict=True)]
        rows.append({"picture": row.name, "class": pairs[0] if pairs else "not finite", "then": ", ".join(pairs[1:])})
    print_table(rows, drop=("then",))


def _show_lines(answers: Answers) -> None:
    import math

    from rayexp.display import figure
    from rayexp.launch.predict import LinePrediction

    rows = [row for row in answers if isinstance(row, LinePrediction)]
    print_table(
        [
            {
                "line": row.name,
                "tokens": row.tokens,
                "unknown": len(row.unknown),
                "loss": figure(row.loss, ".4f"),
                "ppl": figure(row.ppl, ".2f"),
                "text": row.text,
            }
            for row in rows
        ],
        drop=("text",),
    )
    tokens = sum(row.tokens for row in rows)
    if tokens:
        loss = math.fsum(row.loss * row.tokens for row in rows) / tokens
        ppl = figure(math.exp(loss) if loss < 700 else math.inf, ".2f")
        unknown = sum(len(row.unknown) for row in rows)
        tell(f"all: {tokens:,} tokens, {unknown:,} unknown words, loss {figure(loss, '.4f')}, ppl {ppl}")
