"""The examples, the documents and the docstrings' examples run as they stand."""

from __future__ import annotations

import asyncio
import doctest
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rayexp
from rayexp.runs.run import Run

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def cells() -> list[str]:
    """The notebook's code."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_without_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel runs it: inside a running event loop, with streams that are no files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    names: dict[str, Any] = {"__name__": "__main__"}

    async def kernel() -> None:
        for source in cells():
            exec(compile(source, "<cell>", "exec"), names)

    asyncio.run(kernel())
    assert (tmp_path / "model.safetensors").exists()
    assert len(Run.all(tmp_path / "runs")) == 2


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: the cells run without a kernel above")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_the_script_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "library.py", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "the same bits again: True" in done.stdout
    assert done.stdout.rstrip().endswith("model = resnet18(num_classes=20)")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["checkpoints", "configs", "differences", "experiments"])
def test_the_examples_of_docstrings_hold(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"epochs": 1, "data.max_train_samples": 128, "data.max_val_samples": 64, "data.image_size": 32}
    rayexp.train("quickstart", small, runs=tmp_path / "runs", progress=False)
    names = {"rayexp": rayexp, "np": np, "tmp": tmp_path / ("others" if module == "experiments" else "runs")}
    found = importlib.import_module(f"rayexp.library.{module}")
    result = doctest.testmod(found, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted > 0


def test_every_public_name_is_in_the_document() -> None:
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    missing = [name for name in rayexp.__all__ if not re.search(rf"\b{name}\b", text) and name[0] != "_"]
    assert missing == ["Workload"]  # docs/your-own-model.md
    for name in rayexp.__all__:
        value = getattr(rayexp, name)
        assert name.startswith("_") or value.__doc__, name
