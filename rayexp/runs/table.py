"""The epochs of a run as a table: columns of plain values, or a pandas.DataFrame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayexp.config.identity import flat
from rayexp.errors import UserError
from rayexp.runs.records import EpochRecord


def columns(records: Sequence[EpochRecord]) -> dict[str, list[Any]]:
    """The values of each column, in the order of the epochs: `epoch`, `step`, `train_loss`, `val_loss` (nats), the
    metrics, `lr`, `samples_per_second`, `weights_sha`, ... as in epochs.jsonl, with the seconds of each phase as
    `seconds.compute` and so on. None where an epoch has no value, or one that is not finite."""
    rows = [flat(record.to_json()) for record in records]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def to_pandas(records: Sequence[EpochRecord]) -> Any:
    """The same as a pandas.DataFrame, indexed by the epoch.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError(f"to_pandas: needs pandas ({error}); Run.table() has the same columns without it") from None
    return pandas.DataFrame(columns(records)).set_index("epoch") if records else pandas.DataFrame()
