"""Tables on a terminal: columns are left out, then texts wrapped, until a table fits; no word is ever cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rayexp.display import NOT_FINITE, breadth, figure, folded, printable

NUMBER = rf"([-+]?[\d.,]+(e[-+]?\d+)?( ?%)?|{NOT_FINITE})?"  # what a column of numbers holds
GAP = 2  # spaces between two columns
PROSE = 32  # a column that wants more is text: it is wrapped rather than that another column is left out


def table(
    rows: list[dict[str, Any]], drop: Sequence[str], width: int | None, last: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """The rows as lines of text, and the names of the columns that were left out.

    A name, a path or a hash that is wider than the terminal stands whole on an overlong line, so that it can be copied.

    Args:
        rows: their first one's keys are the columns; columns of numbers are set right.
        drop: columns that a narrow terminal does not get, the first to go first.
        width: of the terminal; None: everything on one line a row.
        last: columns that go after those, and only where folding the texts is not enough.
    """
    columns = {name: [printable(name), *(_cell(row[name]) for row in rows)] for name in (rows[0] if rows else ())}
    dropped = []
    for names, least in ((drop, _need), (last, _least)):
        for name in (name for name in names if name in columns):
            if width is None or _total([least(cells) for cells in columns.values()]) <= width:
                break
            dropped.append(name)
            del columns[name]
    right = {
        name: all(type(row[name]) in (int, float) or re.fullmatch(NUMBER, str(row[name] or "")) for row in rows)
        for name in columns
    }
    if width is not None:
        widths = _widths(list(columns.values()), width)
        columns = {
            name: [folded(cell, wide) for cell in cells]
            for (name, cells), wide in zip(columns.items(), widths, strict=True)
        }
    return _drawn(columns, right, width), dropped


def _widths(columns: list[list[str]], width: int) -> list[int]:
    """How wide each column may be: its texts share what the others leave."""
    natural = [max(map(breadth, cells)) for cells in columns]
    widths = [_need(cells) for cells in columns]
    least = [_least(cells) for cells in columns]
    while _total(widths) > width:
        able = [i for i in range(len(widths)) if widths[i] > least[i]]
        if not able:
            break
        widths[max(able, key=lambda i: widths[i])] -= 1  # one at a time, so that the wide ones share the loss
    for i in sorted(range(len(widths)), key=lambda i: natural[i]):
        widths[i] += max(0, min(natural[i] - widths[i], width - _total(widths)))
    return widths


def _need(cells: Sequence[str]) -> int:
    """The width that a column should have; one of texts may be wrapped at PROSE, one of names may not."""
    natural = max(map(breadth, cells))
    return min(natural, PROSE) if any(len(cell.split()) > 1 for cell in cells) else natural


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * max(0, len(widths) - 1) + 2  # and the two edges


def _least(cells: Sequence[str]) -> int:
    """The width of the longest word (or where that is a text's, PROSE: it then stands on an overlong line)."""
    return min(_need(cells), max((breadth(word) for cell in cells for word in cell.split()), default=0))


def _drawn(columns: dict[str, list[str]], right: dict[str, bool], width: int | None) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for name, (head, *_) in columns.items():
        drawn.add_column(head, justify="right" if right[name] else "left", no_wrap=True)
    for row in zip(*(cells for _, *cells in columns.values()), strict=True):
        drawn.add_row(*row)
    whole = _total([max(breadth(line) for cell in cells for line in cell.split("\n")) for cells in columns.values()])
    # Cells hold file names and words of a text: nothing in them is markup.
    console = Console(width=whole, highlight=False, markup=False, emoji=False)
    with console.capture() as got:
        console.print(drawn)
    lines = [line.rstrip() for line in got.get().splitlines()]
    return "\n".join(line if width is None or line.strip(" ─") else line[:width] for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, float):
        return figure(value, ",.4g")
    return printable(str(value))
