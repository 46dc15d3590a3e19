"""`rayexp generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rayexp.cli import _complete
from rayexp.cli._app import RUNS, RunsOption, app
from rayexp.cli._output import say, terminal_width


@app.command()
def generate(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="RUN@EPOCH",
            autocompletion=_complete.runs,
            help="RUN@7, RUN@best, RUN@last, of a language model.",
        ),
    ],
    words: Annotated[int, typer.Option(metavar="N", min=1, help="How many words.")] = 1000,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="Below 1 bolder, above 1 wilder; 0: the likeliest.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(metavar="K", min=1, help="Only the K likeliest words can come.")] = None,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="The same seed gives the same text.")] = 0,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Words to go on from; none: a new line.")] = "",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the text here, not to stdout.", dir_okay=False)
    ] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Write text with a trained language model."""
    import time

    from rayexp.display import counted, folded, printable, short
    from rayexp.runs.run import resolve
    from rayexp.system.disk import write_atomic

    run, epoch = resolve(ref, runs)

    from rayexp.data.text import EOS, UNK
    from rayexp.engine import settings
    from rayexp.workloads.language_model import generate as text

    with settings.threads(1):
        writer = text.open_generator(run, epoch)
        start, unknown = text.read_prompt(prompt, writer)
        if unknown:
            instead = "read as <unk>" if UNK in writer.vocabulary else "left out"
            say(f"prompt: not in the vocabulary, {instead}: {', '.join(dict.fromkeys(unknown))}")
        began = time.perf_counter()
        numbers = text.generate(
            writer.net,
            start or [writer.vocabulary.index(EOS)],
            words,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        said = [writer.vocabulary[n] for n in (*start, *numbers)]
    took = time.perf_counter() - began
    if out:
        write_atomic(out, text.lines(said))
    else:
        print(folded(printable(text.lines(said), keep="\n"), terminal_width(sys.stdout)), end="")
    where, weights = f" -> {out}" if out else "", short(writer.weights_sha)
    say(f"{counted(words, 'word')} in {took:.1f} s, {run.id}@{epoch}, weights {weights}, seed {seed}{where}")
