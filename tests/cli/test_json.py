"""`--json`: stdout is JSON alone, whatever a user's own code prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rayexp.cli._output import only_json, print_json

Typed = Callable[..., subprocess.CompletedProcess[str]]
DATA = """
print("at import")
def D(split):
    print("when made")
    return Pairs()
class Pairs:
    targets = [0, 1, 0, 1]
    def __len__(self): return 4
    def __getitem__(self, i):
        import numpy
        print("when read")
        return numpy.full((8, 8), i, numpy.uint8), i % 2
"""


def test_what_own_code_prints_goes_to_stderr(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "pairs.py").write_text(DATA)
    done = typed("data", "info", "pairs.py:D", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"] == 4
    for line in ("at import", "when made", "when read"):
        assert line in done.stderr
    assert "4 train" in typed("data", "info", "pairs.py:D").stdout


def test_stdout_is_as_before_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout

    @only_json()
    def fails() -> None:
        print("aside")
        print_json({"a": 1})
        raise ValueError("within")

    with pytest.raises(ValueError, match="within"):
        fails()
    assert sys.stdout is before
    print_json([2])
    out, err = capsys.readouterr()
    assert (out, err) == ('{\n  "a": 1\n}\n[\n  2\n]\n', "aside\n")
