"""The command line of a Python process that runs a module of this package.

`python -m` would put the working directory first on sys.path, and a random.py, queue.py or token.py there would be
imported instead of Python's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

# -P leaves the working directory out. The first argument is the folder of the package that runs here, so that the new
# process imports the same one; once the package is imported, its modules are found through it.
_START = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import rayexp
del sys.path[0]
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def command(module: str, *args: str) -> list[str]:
    """The command line for `python -m MODULE ARGS...`, where the module is one of rayexp's."""
    return [sys.executable, "-P", "-c", _START, str(Path(__file__).resolve().parents[2]), module, *args]
