"""`rayexp runs --du`: how much room runs take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rayexp.cli._output import print_json, print_table, tell
from rayexp.display import counted


def show_disk_use(found: Sequence[Path], storage: Path, as_json: bool) -> None:
    """A row for each run, or comparison with the runs in it, the largest first: in MB, as JSON in bytes."""
    from rayexp.runs.removal import PARTS, disk_use

    rows = [{"run": root.name, **asdict(disk_use(root))} for root in found]
    rows.sort(key=lambda row: (-row["total"], row["run"]))
    if as_json:
        print_json(rows)
        return
    if not rows:
        tell(f"no runs in {storage}")
        return
    units = [{name: value if name == "run" else f"{value / 1e6:,.1f}" for name, value in row.items()} for row in rows]
    print_table(
        [{"run": row["run"], "MB": row["total"], **{part: row[part] for part in PARTS}} for row in units],
        drop=("logs", "tb", "predictions"),
    )
    tell(f"{counted(len(rows), 'directory', 'directories')}, {sum(row['total'] for row in rows) / 1e6:,.1f} MB")
