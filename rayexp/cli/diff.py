"""`rayexp diff`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayexp.cli import _complete
from rayexp.cli._app import RUNS, Command, JsonOption, RunsOption, app
from rayexp.cli._output import print_json, say

if TYPE_CHECKING:
    from rayexp.diff.pairs import PairsReport
    from rayexp.diff.report import Report
    from rayexp.runs.run import Run

VERDICT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
SEVERAL = "--baseline"  # takes every word up to the next option


class _Diff(Command):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click, whose options take a fixed number of words."""
        return super().parse_args(ctx, spread(args, SEVERAL))


def spread(args: Sequence[str], option: str) -> list[str]:
    """`--baseline R S --csv F` as `--baseline R --baseline S --csv F`."""
    found: list[str] = []
    taking = False
    for word in args:
        if word == option:
            taking = True
        elif taking and not word.startswith("-"):
            found += [option, word]
        else:
            taking = False
            found.append(word)
    return found


@app.command(cls=_Diff, short_help="Show which judgements changed between checkpoints.")
def diff(
    refs: Annotated[
        list[str],
        typer.Argument(
            metavar="A B ...",
            autocompletion=_complete.runs,
            help="RUN@7 RUN@18; also @best, @last; @18 alone is of the run before it. Three or more: a table of pairs.",
        ),
    ],
    every: Annotated[bool, typer.Option("--all", help="One RUN: churn between every two of its epochs.")] = False,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN RUN...",
            autocompletion=_complete.runs,
            help="Runs with other seeds: is it more than reseeding changes? [default: what `rayexp noise` has stored]",
            show_default=False,
        ),
    ] = None,
    attributes: Annotated[
        Path | None,
        typer.Option("--slice", metavar="FILE.csv", help="Also by attribute: name or index, then a column for each."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, help="Samples: how much a loss must move. [default: a tenth of the median]"),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one offline page with the pictures.", dir_okay=False)
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the list of changed judgements.", dir_okay=False)
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="PP", min=0, help="Verdict: may B be worse by PP points of acc1 (else: % of perplexity or loss)?"
        ),
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Also which layers' weights moved.")] = False,
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="Rows of the printed lists.")] = 20,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Which judgements changed from checkpoint A to checkpoint B, and is it more than chance?

    With --max-drop the exit code is 0 for PASS (the whole 95 % interval of B - A lies above -PP, or both say the same
    of every sample), 1 for FAIL (it lies below, or a judgement of B is not finite) and 3 for INCONCLUSIVE. Of three or
    more, each is held against the first: 1 where one fails, 0 where all pass.
    """
    from rayexp.errors import UserError
    from rayexp.runs.run import Run

    if every:
        others = csv, weights, max_drop is not None, baseline, attributes, tolerance is not None
        if len(refs) != 1 or any(others):
            raise UserError("diff --all takes one RUN, and of the other options --html, --json and --runs only")
        return _diff_all(Run.find(refs[0], runs), html, as_json)
    if len(refs) < 2:
        raise UserError(
            f"diff takes two checkpoints or more, RUN@7 RUN@18 (or RUN@7 @18, or --all RUN); got {len(refs)}"
        )
    from rayexp.diff.pairs import PairsReport
    from rayexp.library.differences import Wanted, compared

    wanted = Wanted(tolerance, max_drop, tuple(baseline or ()), attributes, weights)
    report = compared(refs, wanted, runs, _need_predictions, say)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report, limit)
    if csv:
        from rayexp.system.disk import write_atomic

        write_atomic(csv, report.to_csv())
        say(f"list: {csv}")
    if html:
        from rayexp.diff.page import write_page
        from rayexp.diff.pairs_page import write_pairs_page

        if isinstance(report, PairsReport):
            write_pairs_page(html, report)
        else:
            write_page(html, report)
        say(f"page: {html}")
    raise typer.Exit(VERDICT_CODES[report.verdict] if report.verdict else 0)


def _show(report: Report | PairsReport, limit: int) -> None:
    from rayexp.cli import _diff_more, _diff_pairs, _diff_tables
    from rayexp.diff.pairs import PairsReport

    if isinstance(report, PairsReport):
        _diff_pairs.show_pairs(report, limit)
        return
    _diff_tables.show(report, limit)
    _diff_more.show_noise(report.noise)
    if report.slices:
        _diff_more.show_slices(report.slices, limit)
    if report.weights:
        _diff_tables.show_weights(report.weights, limit)
    _diff_tables.show_verdict(report)


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
