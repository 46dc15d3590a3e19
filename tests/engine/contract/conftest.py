from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rayexp.config import ExperimentConfig, parse
from rayexp.data import open_data
from rayexp.engine import runtime
from rayexp.engine.contract.breach import Contract
from rayexp.engine.contract.check import check
from rayexp.workloads import open_workload
from rayexp.workloads.image_classification.workload import ImageClassification

IMAGES: dict[str, Any] = {
    "data": {"name": "shapes", "max_train_samples": 80, "max_val_samples": 20, "image_size": 32},
    "batch_size": 16,
    "shards": 4,
    "lr": 0.05,
}


@pytest.fixture
def images() -> dict[str, Any]:
    """The keys of a small image classification of 20 classes."""
    return IMAGES


@pytest.fixture
def examined() -> Callable[[ExperimentConfig], Contract]:
    """Check a configuration."""
    return _examined


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Contract]:
    """Check a model of one's own, from images fp32[n, 3, 32, 32] to 20 logits."""

    def run(make: Callable[[], nn.Module], **changes: Any) -> Contract:
        def model(self: ImageClassification) -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return make()

        monkeypatch.setattr(ImageClassification, "model", model)
        return _examined(parse({**IMAGES, **changes}, ExperimentConfig, "test"))

    return run


def _examined(config: ExperimentConfig) -> Contract:
    with runtime.configure(config, torch.device("cpu"), config.shards, 1) as configured:
        return check(config, lambda sized: open_workload(sized, _opened(sized.data)), configured)


@functools.cache
def _opened(data: Any) -> Any:
    """Data that several checks take."""
    return open_data(data)
