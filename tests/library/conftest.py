"""Runs that several tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayexp.config import ExperimentConfig, parse
from rayexp.launch.driver import run as train
from rayexp.runs.run import Run

IMAGES: dict[str, Any] = {
    "name": "pictures",
    "data": {"name": "shapes", "max_train_samples": 40, "max_val_samples": 24, "image_size": 32},
    "model": {"name": "resnet18", "stem": "stride2"},
    "batch_size": 16,
    "shards": 2,
    "epochs": 2,
    "lr": 0.01,
}
TEXT: dict[str, Any] = {
    "name": "words",
    "workload": "language_model",
    "data": {"name": "python_docs", "max_train_tokens": 3000, "max_val_tokens": 600, "bptt": 20},
    "model": {"name": "lstm", "emsize": 16, "nhid": 12, "nlayers": 2, "dropout": 0.2},
    "batch_size": 16,
    "shards": 4,
    "lr": 1.0,
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs."""
    return tmp_path_factory.mktemp("library") / "runs"


def made(folder: Path, tree: dict[str, Any]) -> Run:
    return train(parse({**tree, "storage_path": str(folder)}, ExperimentConfig, "test"), argv=[])


@pytest.fixture(scope="session")
def pictures(runs: Path) -> Run:
    """Two epochs of a ResNet with a stem of its own, on drawn pictures."""
    return made(runs, IMAGES)


@pytest.fixture(scope="session")
def words(runs: Path) -> Run:
    """An epoch of a small LSTM."""
    return made(runs, TEXT)
