from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import runtime
from rayexp.engine.group import WorkerGroup
from rayexp.engine.trainer import Trainer
from rayexp.workloads import open_workload

SMALL: dict[str, dict[str, Any]] = {
    "image_classification": {
        "data": {"name": "shapes", "max_train_samples": 120, "max_val_samples": 40},
        "model": {"name": "mobilenet_v3_small"},
        "batch_size": 32,
        "shards": 8,
    },
    "language_model": {
        "workload": "language_model",
        "data": {"name": "python_docs", "max_train_tokens": 3000, "max_val_tokens": 600, "bptt": 20},
        "model": {"name": "lstm", "emsize": 16, "nhid": 16, "nlayers": 2, "dropout": 0.2},
        "batch_size": 16,
        "shards": 8,
        "lr": 1.0,
        "optimizer": {"momentum": 0, "clip": 0.25},
        "schedule": {"name": "plateau", "gamma": 0.25},
    },
}


@pytest.fixture(params=list(SMALL))
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., ExperimentConfig]:
    """A small configuration of each workload; keywords replace its keys."""

    def make(**changes: Any) -> ExperimentConfig:
        tree = {**SMALL[request.param], "storage_path": str(tmp_path / "runs"), **changes}
        return parse(tree, ExperimentConfig, "test")

    return make


@pytest.fixture
def session() -> Callable[[ExperimentConfig], Trainer]:
    def make(config: ExperimentConfig) -> Trainer:
        here = runtime.configure(config, torch.device("cpu"), config.shards)
        return Trainer(config, open_workload(config), WorkerGroup(), here)

    return make
