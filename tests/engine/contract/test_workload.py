"""What a workload does that the engine cannot keep is told of the workload, and not of its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from rayexp.engine.contract.breach import Contract
from rayexp.workloads.image_classification.workload import ImageClassification

Tried = Callable[..., Contract]


def net() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 20))


def test_a_mean_for_a_loss_is_the_workloads(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ImageClassification.loss

    def mean(self: ImageClassification, model: nn.Module, batch: Any, state: Any) -> Any:
        total, after = loss(self, model, batch, state)
        return total / batch.count, after

    monkeypatch.setattr(ImageClassification, "loss", mean)
    (found,) = tried(net).refused
    assert found.part == "workload"
    assert "not the sum of the samples' losses" in str(found)


def test_a_loss_that_counts_its_batch_is_the_workloads(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ImageClassification.loss

    def counting(self: ImageClassification, model: nn.Module, batch: Any, state: Any) -> Any:
        total, after = loss(self, model, batch, state)
        return total + batch.count**2, after  # no gradient sees it

    monkeypatch.setattr(ImageClassification, "loss", counting)
    (found,) = tried(net).refused
    assert str(found).startswith("workload: its loss of a batch is not the sum of the samples' losses")


def test_metrics_that_are_promised_and_not_there_are_the_workloads(
    tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageClassification, "metrics", lambda self, predictions: {"val_loss": 1.0, "acc1": 2.0})
    (found,) = tried(net).refused
    assert str(found).startswith("workload: its metrics lack acc5; they are val_loss, acc1; allowed: ")
