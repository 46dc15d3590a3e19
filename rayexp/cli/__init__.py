"""The command line. One file per group of commands; every import that costs time stands inside its command.

Exit codes: 0 done; 1 the run or the check failed; 2 the input was wrong; 3 inconclusive (`diff --max-drop`); 128 + its
number where a signal asked to stop: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1, 129 SIGHUP (a closed terminal).
"""

from __future__ import annotations

from rayexp.cli._shell import app, main
from rayexp.cli import quickstart, data, train, show, judge, compare, cluster  # noqa: F401  (in the order of --help)

__all__ = ["app", "main"]
