"""`rayexp compare`, `rayexp report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayexp.cli import _complete
from rayexp.cli._app import RUNS, JsonOption, OverridesArgument, RayOption, RunsOption, app, folder
from rayexp.cli._output import print_json, say, tell
from rayexp.display import counted

if TYPE_CHECKING:
    from rayexp.config import CompareConfig
    from rayexp.grid.comparison import Cell, Comparison
    from rayexp.runs.run import Run

MarkdownOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.", dir_okay=False)
]


@app.command(short_help="Run a device grid: how much faster, and at what price?")
def compare(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML of the grid, or a name that `rayexp configs` lists, for example devices.",
            autocompletion=_complete.configs,
            show_default=False,
        ),
    ] = None,
    overrides: OverridesArgument = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            "--runs",
            metavar="DIR",
            parser=folder,
            help="Make the comparison's directory in there. [default: storage_path]",
        ),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="COMPARE", help="Go on with this comparison; what is done stays.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show which cells run, and why others do not.")] = False,
    address: RayOption = None,
    markdown: MarkdownOption = None,
    as_json: JsonOption = False,
) -> None:
    """The device grid: how much faster on more devices, at what price, and is it still the same model?

    Every cell is an ordinary run, one at a time under Ray Tune, its repeats interleaved with those of the others. The
    exit code is 1 where a cell failed or exact cells ended with different weights.
    """
    from rayexp.cluster.job_context import resolve_path
    from rayexp.config import CompareConfig, find_config, load
    from rayexp.errors import UserError, last_words
    from rayexp.grid.comparison import Comparison
    from rayexp.launch.resuming import go_on

    overrides = [*(overrides or []), *([f"storage_path={runs}"] if runs else [])]
    if resume is None:
        if config is None:
            raise UserError("compare needs a CONFIG (or --resume COMPARE)")
        path = find_config(config)
        grid = load(path, overrides, CompareConfig)
        grid = grid.model_copy(update={"storage_path": resolve_path(grid.storage_path)})
        from rayexp.grid.run import go, planned, start

        base, cells = planned(grid, path.parent, address)
        if dry_run:
            _show_plan(cells, grid, as_json)
            return
        made = start(grid, base, cells, argv=sys.argv)
    else:
        if config is not None:
            raise UserError(f"compare --resume goes on with the grid as it was planned; leave {config} out")
        from rayexp.grid.run import go

        made = Comparison.find(resume, resolve_path(runs or RUNS))
        grid, cells = made.config(), made.cells()
        if dry_run:
            _show_plan(cells, grid, as_json)
            say(f"{counted(len(made.missing()), 'run')} to go, in {made.root}")
            return
    running = [cell for cell in cells if cell.skip is None]
    for cell in cells:
        if cell.skip:
            say(f"skipped {cell.id}: {cell.skip}")
    say(f"{len(running)} of {counted(len(cells), 'cell')}, {counted(len(made.missing()), 'run')} to go, in {made.root}")
    try:
        from rich.console import Console

        go(made, address=address, console=Console(stderr=True))
    except KeyboardInterrupt:
        say("\n".join(last_words(f"interrupted{go_on(made.root, 'compare')}")))
        raise
    _show(made, made.root / "report.html", markdown or made.root / "report.md", as_json, strict=True)


def _show_plan(cells: Sequence[Cell], grid: CompareConfig, as_json: bool) -> None:
    from rayexp.cli import _grid_tables as view

    if as_json:
        print_json(view.plan_json(cells, grid))
    else:
        view.show_plan(cells, grid)


@app.command(short_help="Write one offline page about a run or a comparison.")
def report(
    name: Annotated[str, typer.Argument(metavar="RUN|COMPARE", autocompletion=_complete.runs, show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page. [default: report.html in the directory]", dir_okay=False),
    ] = None,
    markdown: MarkdownOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """One offline page about a run or about a comparison.

    Of a run: curves, where the time goes, and what it is wrong about, or for a language model the perplexity on the
    test text and a text that the best epoch writes. Of a comparison: speed, phases, results.
    """
    from rayexp.errors import UserError
    from rayexp.grid.comparison import Comparison

    found = _find(name, runs)
    if isinstance(found, Comparison):
        _show(found, out or found.root / "report.html", markdown, as_json, strict=False)
        return
    run = found
    if markdown:
        raise UserError("--markdown: for comparisons; a run's table is epochs.jsonl")
    from rayexp.pages.run_page import write_run_page

    out = out or run.root / "report.html"
    records = run.records()
    sample = None
    if records and run.kind() == "tokens":
        from rayexp.launch.sample import language_sample
        from rayexp.runs.records import best

        say("the test text, and a text by the best epoch: a moment")
        sample = language_sample(run, (best(records, run.goals()) or records[-1]).epoch)
    write_run_page(out, run, sample)
    if as_json:
        told = {} if sample is None else {"test": sample.test, "text": sample.text}
        print_json({**run.meta(), "page": str(out), "epochs": [r.to_json() for r in records], **told})
    else:
        tell(str(out))


def _find(name: str, runs: Path) -> Run | Comparison:
    """The run or the comparison of that path or name (UserError where there is neither)."""
    from rayexp.errors import UserError
    from rayexp.grid.comparison import Comparison
    from rayexp.runs.run import Run
    from rayexp.system.disk import NEWEST, matching

    if name == NEWEST:
        made = [*(run.id for run in Run.all(runs)), *(comparison.id for comparison in Comparison.all(runs))]
        name = next(iter(matching(name, made)), name)
    path = Path(name).expanduser()
    if (path / "run.json").is_file():
        return Run.find(name, runs)
    try:
        return Comparison.find(name, runs)
    except UserError as error:
        if not str(error).startswith("no comparison "):
            raise
    try:
        return Run.find(name, runs)
    except UserError as error:
        raise UserError(str(error).replace("no run ", "no run and no comparison ", 1)) from None


def _show(made: Comparison, page: Path, markdown: Path | None, as_json: bool, strict: bool) -> None:
    """Print a comparison, write its page and Markdown, and with `strict` fail where cells failed or weights differ."""
    from rayexp.cli import _grid_tables as view
    from rayexp.errors import RunError
    from rayexp.grid.page import write_compare_page
    from rayexp.grid.report import read_report
    from rayexp.grid.sentences import markdown as to_markdown
    from rayexp.launch.resuming import go_on
    from rayexp.system.disk import write_atomic

    found = read_report(made)
    if as_json:
        print_json(found.to_json())
    elif strict:
        view.show(found)
    if found.cells:
        write_compare_page(page, found)
        if markdown:
            write_atomic(markdown, to_markdown(found))
            say(f"tables: {markdown}")
        say(f"report: {page}") if as_json or strict else tell(str(page))
    elif not strict:
        write_compare_page(page, found)  # says that there is nothing yet
    if not strict:
        return
    if not found.equal:
        raise RunError("; ".join(group.sentence() for group in found.groups if not group.equal))
    if found.failed:
        cells = ", ".join(dict.fromkeys(cell for cell, _, _ in found.failed))
        raise RunError(f"{len(found.failed)} of the runs failed ({cells})", go_on(made.root, "compare"))
