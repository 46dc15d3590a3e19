"""metrics.csv: epochs.jsonl as a table (RFC 4180), for spreadsheets and `pandas.read_csv`.

A row for each epoch, a column for each value of any epoch; those of `seconds` and `peak_memory` are named
`seconds.total` and so on. What an epoch lacks, or what is not finite, is an empty field. It holds nothing that
epochs.jsonl has not, so it is made anew wherever that changes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rayexp.config.identity import flat
from rayexp.system.disk import write_atomic

FILE = "metrics.csv"


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write the table of an epochs.jsonl; a reader, or a crash, sees the old one or the new one.

    Args:
        path: of metrics.csv.
        records: the lines of epochs.jsonl.

    Raises:
        WriteError: it cannot be written.
    """
    write_atomic(path, table(records))


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """The text of the table: a header, then a row for each record."""
    rows = [flat(dict(record)) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
