"""The command line. A file is named for its command (`_*.py`: what they share); slow imports stand in the commands.

Exit codes: 0 done; 1 the run or the check failed; 2 the input was wrong; 3 inconclusive (`diff --max-drop`, `audit`);
128 + its number where a signal asked to stop: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1, 129 SIGHUP (a closed terminal);
141 where nobody reads the output any more, as behind `| head`.
"""

from __future__ import annotations

from rayexp.cli._app import app, main
from rayexp.cli import (  # noqa: F401  (in the order of --help)
    quickstart, configs, data, check, train, verify, audit, runs, summary, doctor, diff, noise, evaluate, predict,
    generate, export, compare, cluster,
)  # fmt: skip

__all__ = ["app", "main"]
