"""Processes of our own import nothing that happens to lie in the working directory."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rayexp
from rayexp.config import ExperimentConfig, parse
from rayexp.launch import processes
from rayexp.launch.job import WorkerJob
from rayexp.runs.run import Run
from rayexp.system import spawn

HOUSE = Path(rayexp.__file__).parent
# Python's own, which Python itself or a library imports at the start.
NAMES = ("random", "queue", "token", "secrets", "statistics", "struct", "numbers", "types", "socket")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A working directory whose files stop whoever imports them."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working directory was imported')")
    return tmp_path


def test_a_module_of_the_working_directory_is_not_imported(hostile: Path) -> None:
    done = subprocess.run(spawn.command("rayexp", "--version"), cwd=hostile, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (rayexp.__version__, "")
    # As a check of the check: python -m does import them.
    done = subprocess.run([sys.executable, "-m", "rayexp", "--version"], cwd=hostile, capture_output=True, text=True)
    assert "of the working directory was imported" in done.stderr


def test_it_is_the_package_that_runs_here(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "path"):
        (folder / "rayexp").mkdir(parents=True)
        (folder / "rayexp" / "__init__.py").write_text("raise SystemExit('another rayexp')")
    done = subprocess.run(
        spawn.command("rayexp", "--version"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "path")},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.stderr) == (rayexp.__version__, "")


def test_a_worker_trains_in_such_a_directory(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "workload": "language_model",
        "data": {"name": "python_docs", "max_train_tokens": 3000, "max_val_tokens": 600, "bptt": 20},
        "model": {"name": "lstm", "emsize": 16, "nhid": 16, "nlayers": 1},
        "batch_size": 16,
        "shards": 4,
        "storage_path": str(hostile / "runs"),
    }
    monkeypatch.chdir(hostile)
    run = Run.create(parse(config, ExperimentConfig, ""), argv=[])
    job = WorkerJob(run=run.root, config=run.config(), device="cpu", max_steps=1)
    processes.wait(job.run, processes.start(job, 1))
    assert run.meta()["status"] == "stopped"


def test_every_python_that_is_started_leaves_the_working_directory_out() -> None:
    started = 0
    for path in HOUSE.rglob("*.py"):
        if path.name == "pool.py":
            continue  # has tests of its own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
                started += 1
                assert ast.unparse(node.elts[1]) == "'-P'", f"{path}, line {node.lineno}"
    assert started
