"""`rayexp diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayexp.cli import _complete
from rayexp.cli._app import RUNS, JsonOption, RunsOption, app
from rayexp.cli._output import print_json, say

if TYPE_CHECKING:
    from rayexp.diff.images_report import ImagesReport
    from rayexp.diff.text import TextReport
    from rayexp.runs.run import Run

VERDICT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


@app.command(short_help="Show which judgements changed between two checkpoints.")
def diff(
    refs: Annotated[
        list[str],
        typer.Argument(
            metavar="A B",
            autocompletion=_complete.runs,
            help="RUN@7 RUN@18; also @best, @last; B may be @18 alone.",
        ),
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
    from rayexp.system.disk import NEWEST

    if every:
        if len(refs) != 1 or csv or weights or max_drop is not None:
            raise UserError("diff --all takes one RUN, and of the other options --html, --json and --runs only")
        return _diff_all(Run.find(refs[0], runs), html, as_json)
    if len(refs) != 2:
        raise UserError(f"diff takes two checkpoints, RUN@7 RUN@18 (or RUN@7 @18, or --all RUN); got {len(refs)}")
    if refs[1].startswith("@") and not refs[1].startswith(NEWEST):
        refs = [refs[0], refs[0].rpartition("@")[0] + refs[1] if "@" in refs[0] else refs[0] + refs[1]]
    a, b = (resolve(ref, runs) for ref in refs)
    for run, epoch in (a, b):
        _need_predictions(run, epoch)

    from rayexp.cli import _diff_tables as view
    from rayexp.diff.pair import read_pair

    pair = read_pair(a, b)
    report: ImagesReport | TextReport
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
    from rayexp.cli import _diff_tables as view
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
    """Predict the validation data once where the run has not stored it."""
    if not run.predictions_path(epoch).exists():
        from rayexp.launch.evaluate import predict

        say(f"{run.id}@{epoch}: no stored predictions; judging the validation data once")
        predict(run, epoch)
