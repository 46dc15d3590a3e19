"""What commands print: the answer on stdout, as text, tables or JSON; progress and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from typing import Any

from rayexp.display import NOT_FINITE, figure, plain, printable

NUMBER = rf"([-+]?[\d.,]+(e[-+]?\d+)?( ?%)?|{NOT_FINITE})?"  # what a column of numbers holds


def say(text: str = "") -> None:
    """One line of progress or advice, on stderr."""
    with contextlib.suppress(OSError):  # the terminal may have been closed
        print(printable(text, keep="\n"), file=sys.stderr, flush=True)


def tell(text: str = "") -> None:
    """One line of the answer, on stdout."""
    print(printable(text, keep="\n"), flush=True)


def print_json(value: Any) -> None:
    """The whole answer as strict JSON on stdout: what is not finite is null."""
    print(json.dumps(plain(value), indent=2, default=str, allow_nan=False))


def print_table(rows: list[dict[str, Any]], title: str = "") -> None:
    """A table on stdout; the first row's keys are the columns; numbers are set right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in rows[0] if rows else ():
        right = all(isinstance(r[name], int | float) or re.fullmatch(NUMBER, str(r[name] or "")) for r in rows)
        table.add_column(printable(name), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    width = None if sys.stdout.isatty() else 200
    # Cells hold file names and words of a text: nothing in them is markup.
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    if title:
        console.print(printable(title), style="italic")
    console.print(table)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float):
        return figure(value, ",.4g")
    return printable(str(value))


def error_line(text: str) -> None:
    """One red line on stderr."""
    line = f"error: {printable(' '.join(text.split()))}"
    with contextlib.suppress(OSError):
        print(f"\033[31m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
