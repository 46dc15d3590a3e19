"""The command of a Python process that runs a module of this package.

`python -m` would put the working directory first where modules are looked for, and a random.py, queue.py or token.py
that happens to lie there would be imported in place of Python's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

# -P leaves the working directory out. The package is the one that runs here, wherever it was found; once it is
# imported, its modules are found through it.
_START = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import rayexp
del sys.path[0]
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def command(module: str, *words: str) -> list[str]:
    """`python -m MODULE WORD ...` for a module of rayexp."""
    return [sys.executable, "-P", "-c", _START, str(Path(__file__).resolve().parents[2]), module, *words]
