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
    from rayexp.diff.noise import NoiseFloor
    from rayexp.diff.pair import Checkpoint
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
    of every sample), 1 for FAIL (it lies below, or a judgement of B is not finite) and 3 for INCONCLUSIVE.
    """
    from rayexp.errors import UserError
    from rayexp.runs.run import Run

    options = {
        "--csv": csv, "--weights": weights, "--max-drop": max_drop is not None, "--baseline": baseline,
        "--slice": attributes, "--tolerance": tolerance is not None,
    }  # fmt: skip
    if every:
        if len(refs) != 1 or any(options.values()):
            raise UserError("diff --all takes one RUN, and of the other options --html, --json and --runs only")
        return _diff_all(Run.find(refs[0], runs), html, as_json)
    if len(refs) < 2:
        raise UserError(
            f"diff takes two checkpoints or more, RUN@7 RUN@18 (or RUN@7 @18, or --all RUN); got {len(refs)}"
        )
    places = _resolve(refs, runs)
    if len(refs) > 2:
        if unfit := [name for name in ("--weights", "--max-drop", "--baseline", "--slice") if options[name]]:
            raise UserError(f"{unfit[0]}: is for two checkpoints; got {len(refs)}")
        return _diff_pairs(places, tolerance, html, csv, limit, as_json)

    from rayexp.cli import _diff_more, _diff_tables
    from rayexp.diff.floors import beside
    from rayexp.diff.pair import read_pair
    from rayexp.diff.report import compare

    a, b = read_pair(*places)
    report = compare(a, b, tolerance).within(max_drop)
    floor = _floor(a, b, baseline or [], getattr(report, "tolerance", None), runs)
    report = report.beside(beside(floor, a, b, report.churn))
    moved = slices = None
    if weights:
        from rayexp.diff.weights import diff_weights

        moved = diff_weights(*places)
    if attributes:
        from rayexp.diff.slices import diff_slices

        slices = diff_slices(a, b, attributes, getattr(report, "tolerance", 0.0))
    if as_json:
        parts = {"weights": moved and moved.to_json(), "slices": slices and slices.to_json()}
        print_json({**report.to_json(), **{name: part for name, part in parts.items() if part}})
    else:
        _diff_tables.show(report, limit)
        _diff_more.show_noise(report.noise)
        if slices:
            _diff_more.show_slices(slices, limit)
        if moved:
            _diff_tables.show_weights(moved, limit)
        _diff_tables.show_verdict(report)
    _write_csv(csv, report)
    if html:
        from rayexp.diff.page import write_page

        write_page(html, report, moved, slices)
        say(f"page: {html}")
    raise typer.Exit(VERDICT_CODES[report.verdict] if report.verdict else 0)


def _resolve(refs: Sequence[str], runs: Path) -> list[tuple[Run, int]]:
    """The checkpoints, with predictions; `@18` is of the run of the reference before it."""
    from rayexp.errors import UserError
    from rayexp.runs.records import reference
    from rayexp.runs.run import resolve
    from rayexp.system.disk import NEWEST

    whole: list[str] = []
    for ref in refs:
        if whole and ref.isdecimal():
            raise UserError(f"{ref}: an epoch has its @ before it: {whole[0]} @{ref}")
        later = whole and ref.startswith("@") and not ref.startswith(NEWEST)
        whole.append(reference(whole[-1]).run + ref if later else ref)
    places = [resolve(ref, runs) for ref in whole]
    for run, epoch in places:
        _need_predictions(run, epoch)
    return places


def _floor(a: Checkpoint, b: Checkpoint, refs: Sequence[str], tolerance: float | None, runs: Path) -> NoiseFloor | None:
    """The noise floor that was named, else one that is stored."""
    from rayexp.diff.changes import default_tolerance
    from rayexp.diff.floors import baseline, find
    from rayexp.runs.records import reference
    from rayexp.runs.run import Run, resolve

    if tolerance is None:
        tolerance = default_tolerance(a.predictions, b.predictions)
    if not refs:
        return find(a, b, runs, tolerance, say)
    places = []
    for ref in refs:
        if reference(ref).run != ref:
            places.append(resolve(ref, runs))
        else:
            run = Run.find(ref, runs)
            places.append((run, b.epoch if run.predictions_path(b.epoch).exists() else run.epoch("last")))
    for run, epoch in places:
        _need_predictions(run, epoch)
    return baseline(places, a, b, tolerance)


def _write_csv(path: Path | None, report: Any) -> None:
    if path:
        from rayexp.system.disk import write_atomic

        write_atomic(path, report.to_csv())
        say(f"list: {path}")


def _diff_pairs(
    places: Sequence[tuple[Run, int]],
    tolerance: float | None,
    html: Path | None,
    csv: Path | None,
    limit: int,
    as_json: bool,
) -> None:
    from rayexp.cli import _diff_more
    from rayexp.diff.pair import read
    from rayexp.diff.pairs import diff_pairs

    report = diff_pairs([read(*place) for place in places], tolerance)
    if as_json:
        print_json(report.to_json())
    else:
        _diff_more.show_pairs(report, limit)
    _write_csv(csv, report)
    if html:
        from rayexp.diff.pairs_page import write_pairs_page

        write_pairs_page(html, report)
        say(f"page: {html}")


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
