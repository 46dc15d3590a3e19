"""`rayexp doctor`."""

from __future__ import annotations

import typer

from rayexp.cli._app import RUNS, JsonOption, RunsOption, app
from rayexp.cli._output import print_json, print_table


@app.command(short_help="Check this machine: versions, devices, Ray, the disk.")
def doctor(runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """Check this machine: versions that fit together, devices, Ray, room on the disk. Exits 1 where one is wrong."""
    from rayexp.launch.doctor import examine

    findings = examine(runs)
    if as_json:
        print_json([{"what": f.what, "found": f.found, "ok": f.ok} for f in findings])
    else:
        print_table([{"": "ok" if f.ok else "WRONG", "what": f.what, "found": f.found} for f in findings])
    raise typer.Exit(0 if all(f.ok for f in findings) else 1)
