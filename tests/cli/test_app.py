"""What all commands have in common: how they end, and how they read the folder of runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rayexp.cli._app import folder


@pytest.mark.parametrize("words", [["configs"], ["configs", "--json"]], ids=["text", "json"])
def test_a_reader_that_is_gone_is_no_error(words: list[str]) -> None:
    """As behind `| head`: nobody wants to read of it."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, "-m", "rayexp", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_folder_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave it in `--runs=~/runs`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder("~/runs") == tmp_path / "runs"
    assert folder("runs/~") == Path("runs/~")
    assert folder("~nobody-of-this-name/runs") == Path("~nobody-of-this-name/runs")


def test_a_python_without_the_dependencies_is_named() -> None:
    """As where a job's `python` is another environment than that of the cluster's `ray`."""
    code = "import runpy, sys; sys.modules['typer'] = None; runpy.run_module('rayexp', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sys.executable} has no typer, which rayexp needs: ")
    assert done.stderr.count("\n") == 1
