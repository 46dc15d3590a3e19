"""Commands that judge checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayexp.cli._shell import RUNS, JsonOption, RunsOption, app, print_json, say, tell

if TYPE_CHECKING:
    from rayexp.diff.images import DiffReport
    from rayexp.diff.text import TextReport
    from rayexp.runs.run import Run

# ---------------------------------------------------------------------- diff

VERDICT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


@app.command()
def diff(
    refs: Annotated[
        list[str], typer.Argument(metavar="A B", help="RUN@7 RUN@18; also @best, @last; B may be @18 alone.")
    ],
    every: Annotated[bool, typer.Option("--all", help="One RUN: churn between every two of its epochs.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write one offline page with the pictures.", dir_okay=False)] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the list of changed judgements.", dir_okay=False)] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="PP", min=0, help="Verdict: may B be worse by PP points of acc1 (text: % of perplexity)?"),
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Also which layers' weights moved.")] = False,
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="Rows of the printed lists.")] = 20,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Which judgements changed from checkpoint A to checkpoint B, and is it more than chance?

    With --max-drop the exit code is 0 for PASS (the whole 95 % interval of B - A lies above -PP, or both say the same
    of every sample), 1 for FAIL (it lies below, or a judgement of B is not finite) and 3 for INCONCLUSIVE.
    """
    from rayexp.errors import UserError
    from rayexp.runs.run import Run, resolve

    if every:
        if len(refs) != 1 or csv or weights or max_drop is not None:
            raise UserError("diff --all takes one RUN, and of the other options --html, --json and --runs only")
        return _diff_all(Run.find(refs[0], runs), html, as_json)
    if len(refs) != 2:
        raise UserError(f"diff takes two checkpoints, RUN@7 RUN@18 (or RUN@7 @18, or --all RUN); got {len(refs)}")
    if refs[1].startswith("@"):
        refs = [refs[0], refs[0].rpartition("@")[0] + refs[1] if "@" in refs[0] else refs[0] + refs[1]]
    a, b = (resolve(ref, runs) for ref in refs)
    for run, epoch in (a, b):
        _need_predictions(run, epoch)

    from rayexp.cli import _show_diff as view
    from rayexp.diff.pair import read_pair

    pair = read_pair(a, b)
    report: DiffReport | TextReport
    if pair[0].predictions.kind == "images":
        from rayexp.diff.images import diff_images

        report = diff_images(*pair).within(max_drop)
    else:
        from rayexp.diff.text import diff_text

        report = diff_text(*pair).within(max_drop)
    moved = None
    if weights:
        from rayexp.diff.weights import diff_weights

        moved = diff_weights(a, b)
    if as_json:
        print_json({**report.to_json(), **({"weights": moved.to_json()} if moved else {})})
    else:
        view.show(report, limit)
        if moved:
            view.show_weights(moved, limit)
        view.show_verdict(report)
    if csv:
        from rayexp.system.disk import write_atomic

        write_atomic(csv, report.to_csv())
        say(f"list: {csv}")
    if html:
        from rayexp.diff.page import write_page

        write_page(html, report, moved)
        say(f"page: {html}")
    raise typer.Exit(VERDICT_CODES[report.verdict] if report.verdict else 0)


def _diff_all(run: Run, html: Path | None, as_json: bool) -> None:
    from rayexp.cli import _show_diff as view
    from rayexp.diff.churn import diff_all

    epochs = sorted({*run.epochs(), *(r.epoch for r in run.records())})
    for epoch in epochs:
        _need_predictions(run, epoch)
    report = diff_all(run, epochs)
    if as_json:
        print_json(report.to_json())
    else:
        view.show_churn(report)
    if html:
        from rayexp.diff.churn_page import write_churn_page

        write_churn_page(html, report)
        say(f"page: {html}")


def _need_predictions(run: Run, epoch: int) -> None:
    """Judge the validation data once where the run did not store it."""
    if not run.predictions_path(epoch).exists():
        from rayexp.launch.evaluate import predict

        say(f"{run.id}@{epoch}: no stored predictions; judging the validation data once")
        predict(run, epoch)


# ---------------------------------------------------------------------- evaluate


@app.command()
def evaluate(
    ref: Annotated[str, typer.Argument(metavar="RUN@EPOCH", help="RUN@7, RUN@best, RUN@last.")],
    moved: Annotated[
        list[str] | None,
        typer.Argument(metavar="[data.root=DIR]", help="Where the run's data lies now.", show_default=False),
    ] = None,
    print_freq: Annotated[int, typer.Option("--print-freq", metavar="N", min=1, help="A line every N batches.")] = 10,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Judge the validation data with a checkpoint, in the words of pytorch/examples' imagenet/main.py.

    Predictions that the run lacks are stored; those that it has are compared. Data that has moved is the run's own
    where its hash is.
    """
    from rayexp.cli._meters import Progress, summary
    from rayexp.runs.run import resolve

    root = _moved(moved or [])
    run, epoch = resolve(ref, runs)

    from rayexp.launch.evaluate import evaluate

    progress = Progress(print_freq)
    found = evaluate(run, epoch, progress.begin, None if as_json else progress.seen, root)
    if as_json:
        print_json(
            {
                "run": run.id,
                "epoch": epoch,
                "n": len(found.predictions),
                "not_finite": found.not_finite,
                **found.metrics,
                "weights_sha": found.weights_sha,
                "predictions": str(run.predictions_path(epoch)),
                "stored": found.stored,
                "equal": found.equal,
            }
        )
        return
    tell(summary(found.metrics))
    if found.not_finite:
        say(f"NOT FINITE: the model's output for {found.not_finite:,} of {len(found.predictions):,} samples")
    if found.stored:
        say(f"predictions: {run.predictions_path(epoch)}")
    elif not found.equal:
        say(
            "these differ from the predictions that training stored: another device or other versions round differently"
        )


def _moved(words: list[str]) -> Path | None:
    """DIR of `data.root=DIR`; nothing else of a run can be set (UserError)."""
    from rayexp.errors import UserError

    root = None
    for word in words:
        key, _, value = word.partition("=")
        if key != "data.root" or not value:
            raise UserError(f"{word!r}: evaluate takes data.root=DIR only; all else is as the run was trained")
        root = Path(value)
    return root


# ---------------------------------------------------------------------- generate


@app.command()
def generate(
    ref: Annotated[str, typer.Argument(metavar="RUN@EPOCH", help="RUN@7, RUN@best, RUN@last, of a language model.")],
    words: Annotated[int, typer.Option(metavar="N", min=1, help="How many words.")] = 1000,
    temperature: Annotated[float, typer.Option(min=0, help="Below 1 bolder, above 1 wilder; 0: the likeliest.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(metavar="K", min=1, help="Only the K likeliest words can come.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Words to go on from; none: a new line.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the text here, not to stdout.", dir_okay=False)] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Write text with a trained language model."""
    import time

    from rayexp.display import printable
    from rayexp.runs.run import resolve
    from rayexp.system.disk import write_atomic

    run, epoch = resolve(ref, runs)

    from rayexp.data.text import EOS, UNK
    from rayexp.workloads.language_model import generate as text

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
        print(printable(text.lines(said), keep="\n"), end="")
    where = f" -> {out}" if out else ""
    say(f"{words} words in {took:.1f} s, {run.id}@{epoch}, weights {writer.weights_sha[:12]}, seed {seed}{where}")
