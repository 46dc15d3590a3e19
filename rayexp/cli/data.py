"""`rayexp data fetch`, `rayexp data info`, `rayexp data cache`."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from rayexp.cli import _complete
from rayexp.cli._app import App, Group, JsonOption, app, folder
from rayexp.cli._output import print_json, print_table, say, tell
from rayexp.display import counted

data = App(cls=Group, help="Fetch, check and pack datasets; show what is packed.")
app.add_typer(data, name="data")
SHOWN = 10  # classes in the table
FETCHED = {
    "tiny_imagenet": "200 classes, 110,000 images of 64 px; from its home page, or --from ZIP|TAR|DIR|URL",
    "wikitext2": "2.5 million words of Wikipedia; --from ZIP|TAR|DIR|URL",
    "shapes": "20 classes, 5,000 images of 64 px, drawn here; training draws them by itself",
}


@data.command(short_help="Check a dataset and pack it once; alone, list what there is.")
def fetch(
    dataset: Annotated[
        str | None,
        typer.Argument(
            metavar="DATASET",
            help="What to fetch. [default: list what there is]",
            autocompletion=_complete.datasets,
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="ZIP|TAR|DIR|URL", help="Where the data is. tiny_imagenet: its home page."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", parser=folder, help="Where to pack it. [default: data/DATASET]"),
    ] = None,
) -> None:
    """Check a dataset's files, relabel them, and pack them once into arrays that all workers share.

    Reads a ZIP or a folder in place, and a tar by way of the cache. Interrupted (Ctrl-C), the same command goes on;
    finished, it says so at once.
    """
    if dataset is None:
        _list_fetched()
        return
    from rayexp.data.describe import describe
    from rayexp.errors import UserError

    module = _module(dataset)
    if not hasattr(module, "fetch"):
        raise UserError(f"{dataset}: nothing to fetch; `rayexp data info` shows it, data.name={dataset} trains on it")
    if source is None and not hasattr(module, "URL") and dataset != "shapes":
        raise UserError(f"--from: {dataset} needs a ZIP, a tar, a folder or a URL")
    to = to or Path("data") / dataset
    try:
        result = module.fetch(source, to)
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from here")
        raise
    for note in result.get("notes", ()) if isinstance(result, dict) else ():
        say(f"note: {note}")
    tell(f"{'already there' if result is False else 'packed'}: {_line(describe(str(to)))} in {to}")
    tell(f"train with data.name={dataset} data.root={to}")


@data.command(short_help="Show counts, classes and hashes of a dataset or folder.")
def info(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|DIR",
            help="shapes, data/tiny_imagenet, ./FILE.py:NAME, ...",
            autocompletion=_complete.datasets,
            show_default=False,
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[data.KEY=VALUE]...", help="What a dataset of your own is called with.", show_default=False
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Also read every pixel and compare the hashes.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Counts, classes with their words, and hashes of a packed dataset."""
    from rayexp.data.describe import describe

    summary = describe(dataset, check, options or ())
    if as_json:
        print_json(summary)
        return
    tell(_line(summary))
    for name, value in summary.items():
        if isinstance(value, dict):
            for part, inner in value.items():
                tell(_field(f"{name} {part}", inner))
        elif name not in ("kind", "name", "train", "val", "classes"):
            tell(_field(name, value))
    if check:
        tell("  check        every hash is as it should be")
    if classes := summary.get("classes"):
        tell()
        print_table(classes[:SHOWN])
        if len(classes) > SHOWN:
            tell(f"... and {counted(len(classes) - SHOWN, 'more class', 'more classes')} (--json lists all)")


@data.command(short_help="Show what the cache keeps, and remove what is stale.")
def cache(
    prune: Annotated[bool, typer.Option("--prune", help="Remove what is stale.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What rayexp keeps in its cache, and what of it is stale: nothing that still stands leads to it.

    Never removed: what is packed for a folder, or of code of yours, that stands as it did; finished downloads; and what
    a process is using.
    """
    from rayexp.data import prune as cleaning
    from rayexp.system.cache import cache_dir

    found = list(cleaning.prune()) if prune else cleaning.entries()
    if as_json:
        print_json([entry.to_json() for entry in found])
        return
    if found:
        print_table(
            [
                {"what": one.what, "MB": one.bytes / 1e6, "stale": "yes" if one.stale else "", "why": one.state,
                 "path": str(one.path)}
                for one in found
            ]
        )  # fmt: skip
    stale = [entry for entry in found if entry.stale]
    amount = f"{len(stale)} of {len(found)}" if not prune else f"{len(stale)}"
    size = f"{sum(entry.bytes for entry in stale) / 1e6:,.1f} MB"
    if prune:
        tell(f"removed: {amount}, {size}, from {cache_dir()}")
    else:
        tell(f"stale: {amount}, {size}, in {cache_dir()}{' (--prune removes them)' if stale else ''}")


def _list_fetched() -> None:
    for name, what in FETCHED.items():
        tell(_wrapped(f"{name:<14} {what}"))
    tell("Nothing to fetch: python_docs comes with Python; your own images and text are read where they lie")
    tell("(data.name=folder or text, data.root=DIR; `rayexp data info DIR` shows what would be taken).")


def _line(summary: dict[str, Any]) -> str:
    """`16,000 train and 10,000 val images of 200 classes`."""
    if summary["kind"] == "images":
        classes = counted(len(summary["classes"]), "class", "classes")
        return f"{summary['train']:,} train and {counted(summary['val'], 'val image')} of {classes}"
    tokens = ", ".join(f"{count:,} {split}" for split, count in summary["tokens"].items())
    return f"{tokens} tokens; {counted(summary['vocabulary'], 'word')}"


def _field(name: str, value: Any) -> str:
    """A line of `data info`; on a terminal, as many as it takes."""
    return _wrapped(f"  {name:<12} {_number(value)}")


def _wrapped(line: str) -> str:
    """A line of two columns, of which the second is wrapped on a terminal."""
    if not sys.stdout.isatty():
        return line
    columns = shutil.get_terminal_size().columns
    return textwrap.fill(line, columns, subsequent_indent=15 * " ", break_long_words=False, break_on_hyphens=False)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _module(dataset: str) -> Any:
    import importlib

    from rayexp.data import DATASETS
    from rayexp.errors import UserError, nearest

    if dataset not in DATASETS:
        raise UserError(f"unknown dataset {dataset!r}{nearest(dataset, DATASETS)}; allowed: {', '.join(DATASETS)}")
    return importlib.import_module(DATASETS[dataset])
