"""What a workload does that the engine cannot keep is told of the workload, and not of its model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rayexp.engine.contract import passes
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


def test_what_feed_changes_beside_what_it_gives_is_told(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss whose weight follows from the epoch: on a CPU it works; on a GPU a graph would keep the first weight."""
    feed, loss = ImageClassification.feed, ImageClassification.loss

    def noting(self: Any, epoch: int, step: int, shards: range) -> Any:
        self.now = epoch, step
        return feed(self, epoch, step, shards)

    def weighed(self: Any, model: nn.Module, batch: Any, state: Any) -> Any:
        total, after = loss(self, model, batch, state)
        return total * (1 + self.now[0]), after

    monkeypatch.setattr(ImageClassification, "feed", noting)
    assert tried(net, epochs=3).breaches == ()
    monkeypatch.setattr(ImageClassification, "loss", weighed)
    contract = tried(net, epochs=3)
    assert contract.refused == []
    (found,) = contract.warnings
    assert str(found).startswith("workload: feed changes what becomes of an earlier batch (the loss differs)")
    assert "arrays of feed's own" in str(found)
    on_gpu: Any = SimpleNamespace(runtime=SimpleNamespace(device=torch.device("cuda", 0)))
    assert passes._of_feed("the loss", on_gpu).level == "exact"


def test_a_loss_that_counts_calls_is_not_laid_to_feed(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, calls = ImageClassification.loss, itertools.count(1)

    def counting(self: Any, model: nn.Module, batch: Any, state: Any) -> Any:
        total, after = loss(self, model, batch, state)
        return total * next(calls), after

    monkeypatch.setattr(ImageClassification, "loss", counting)
    assert not any("feed" in str(breach) for breach in tried(net).breaches)
