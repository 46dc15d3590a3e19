"""`rayexp configs`."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

from rayexp.cli._app import JsonOption, app
from rayexp.cli._output import print_json, tell

KINDS = {"experiment": "Experiments, for train, verify, summary and submit:", "grid": "Grids, for compare:"}


@app.command("configs", short_help="List the configurations that come with rayexp.")
def configs_command(as_json: JsonOption = False) -> None:
    """List the configurations that come with rayexp; their names stand for CONFIG."""
    from rayexp.config import headline, shipped_configs

    found = shipped_configs()
    if as_json:
        print_json([{"name": n, "kind": _kind(p), "what": headline(p), "path": str(p)} for n, p in found.items()])
        return
    width = max(map(len, found))
    columns = max(shutil.get_terminal_size().columns, width + 34)
    for kind, title in KINDS.items():
        tell(title)
        for name, path in found.items():
            if _kind(path) == kind:
                begin, go_on = f"  {name:<{width}}  ", " " * (width + 4)
                tell(
                    textwrap.fill(
                        headline(path), columns, initial_indent=begin, subsequent_indent=go_on, break_on_hyphens=False
                    )
                )
    tell("A file of yours with the same name wins; KEY=VALUE changes what is in it.")


def _kind(path: Path) -> str:
    from rayexp.config import is_grid

    return "grid" if is_grid(path) else "experiment"
