"""What commands print: the answer on stdout, as text, tables or JSON; progress and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from rayexp.display import folded, plain, printable


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal that the stream is; None where it is none: then nothing is left out or folded."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def say(text: str = "") -> None:
    """One line of progress or advice, on stderr."""
    with contextlib.suppress(OSError):  # the terminal may have been closed
        print(folded(printable(text, keep="\n"), terminal_width(sys.stderr)), file=sys.stderr, flush=True)


def tell(text: str = "") -> None:
    """One line of the answer, on stdout."""
    print(folded(printable(text, keep="\n"), terminal_width(sys.stdout)), flush=True)


_answer: TextIO | None = None  # stdout, while `only_json` keeps it


@contextlib.contextmanager
def only_json() -> Iterator[None]:
    """Keep stdout for `print_json`: all else that is printed, above all by a user's own code, goes to stderr."""
    global _answer
    before, _answer = _answer, sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _answer = before


def print_json(value: Any) -> None:
    """The whole answer as strict JSON on stdout: what is not finite is null."""
    print(json.dumps(plain(value), indent=2, default=str, allow_nan=False), file=_answer or sys.stdout)


def print_table(
    rows: list[dict[str, Any]], title: str = "", drop: Sequence[str] = (), last: Sequence[str] = ()
) -> None:
    """A table on stdout; the first row's keys are the columns; numbers are set right.

    A terminal that is too narrow does not get the columns of `drop`, the first to go first, and then of `last` where
    folding texts is not enough; stderr names them. Without rows nothing is printed.
    """
    if not rows:
        return
    from rich.console import Console

    from rayexp.cli._table import table

    width = terminal_width(sys.stdout)
    text, dropped = table(rows, drop, width, last)
    if title:
        Console(highlight=False, markup=False, emoji=False).print(printable(title), style="italic", soft_wrap=True)
    print(text, flush=True)
    if dropped:
        say(f" left out at {width} columns (--json has all): {', '.join(dropped)}")


def error_line(text: str) -> None:
    """One red line on stderr."""
    line = folded(f"error: {printable(' '.join(text.split()))}", terminal_width(sys.stderr))
    with contextlib.suppress(OSError):
        print(styled(line, 31, sys.stderr), file=sys.stderr, flush=True)


def styled(text: str, style: int, stream: TextIO) -> str:
    """The text in a terminal's style (1: bold, 31: red). As it is where the stream is no terminal, where that has no
    styles (TERM=dumb), and where none are wanted (NO_COLOR)."""
    bare = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if bare else f"\033[{style}m{text}\033[0m"
