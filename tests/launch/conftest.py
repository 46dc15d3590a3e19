"""Small experiments, a run of one, and patience."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayexp.config import ExperimentConfig, parse
from rayexp.runs.run import Run

# Small and quick: a step takes milliseconds, an epoch has some ten of them.
TINY: dict[str, Any] = {
    "name": "tiny",
    "workload": "language_model",
    "data": {"name": "python_docs", "max_train_tokens": 3000, "max_val_tokens": 600, "bptt": 20},
    "model": {"name": "lstm", "emsize": 16, "nhid": 16, "nlayers": 1, "dropout": 0.2},
    "epochs": 2,
    "batch_size": 16,
    "shards": 2,
    "lr": 1.0,
    "weight_decay": 0.0,
    "optimizer": {"momentum": 0.5, "clip": 0.25},
}
# Smaller still, with all that a state holds: four epochs of four steps.
WORDS: dict[str, Any] = {
    "name": "words",
    "workload": "language_model",
    "data": {"name": "python_docs", "max_train_tokens": 1300, "max_val_tokens": 300, "bptt": 20},
    "model": {"name": "lstm", "emsize": 8, "nhid": 8, "nlayers": 1, "dropout": 0.2},
    "epochs": 4,
    "batch_size": 16,
    "shards": 4,
    "schedule": {"name": "plateau", "gamma": 0.5},
    "optimizer": {"momentum": 0.5, "clip": 0.25},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., ExperimentConfig]:
    """A small configuration, its runs in tmp_path/runs; keywords replace its keys."""

    def make(**changes: Any) -> ExperimentConfig:
        return parse({**TINY, "storage_path": str(tmp_path / "runs"), **changes}, ExperimentConfig, "test")

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A language model's run of four epochs, in one process. Copy it before you change it."""
    from rayexp.launch.driver import run

    folder = tmp_path_factory.mktemp("trained")
    return run(parse({**WORDS, "storage_path": str(folder)}, ExperimentConfig, "test"), argv=[])


@pytest.fixture
def made(trained: Run, tmp_path: Path) -> Run:
    """A copy of it."""
    return Run(Path(shutil.copytree(trained.root, tmp_path / "runs" / trained.id)))


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., ExperimentConfig]:
    """The configuration of `trained`, its runs in tmp_path/runs; keywords replace its keys."""

    def make(**changes: Any) -> ExperimentConfig:
        return parse({**WORDS, "storage_path": str(tmp_path / "runs"), **changes}, ExperimentConfig, "test")

    return make


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for the names of Ray's sockets (107 characters in all)."""
    with tempfile.TemporaryDirectory(prefix="rx-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait for something to become true."""

    def wait(condition: Callable[[], Any], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.01)

    return wait
