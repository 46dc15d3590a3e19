"""A counter that nothing asks for stands beside a graph; one that something asks for does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayexp.engine import checkpoint
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.workloads.image_classification.workload import ImageClassification

TREE: dict[str, Any] = {  # three steps an epoch, the last one of half a batch
    "data": {"name": "shapes", "max_train_samples": 20, "max_val_samples": 8, "image_size": 8, "augment": None},
    "batch_size": 8,
    "shards": 2,
    "lr": 0.05,
}
SEEN: list[Any] = []


class Counts(nn.Module):
    """In every way that asks for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 20)
        self.calls, self.left, self.shorter = 0, 1.0, 0
        self.by_name = {"images": 0}

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(self.middle(x) if self.training else x)

    def middle(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.left = 1 + self.left - 1.1
        self.by_name["images"] += len(x)
        assert isinstance(self.calls, int)
        return self.more(x)

    def more(self, x: Tensor) -> Tensor:
        return x


class OfShorter(Counts):
    """The first graph has not seen that anybody counts."""

    def middle(self, x: Tensor) -> Tensor:
        if len(x) < 8:
            self.shorter += 1
        return x * (1 + self.shorter)


class AsksLater(Counts):
    """Where the first graph only counts."""

    def more(self, x: Tensor) -> Tensor:
        return x * (1 + self.calls % 3) if len(x) < 8 else x


class Uncounted(Counts):
    """The second graph asks, and does not count."""

    def middle(self, x: Tensor) -> Tensor:
        if len(x) < 8:
            return x * (1 + self.calls % 3)
        self.calls += 1
        return x


def kept(net: Counts, x: Tensor) -> Tensor:
    SEEN.append(net.calls)
    return x * len(SEEN)


def copied(net: Counts, x: Tensor) -> Tensor:
    net.last = net.calls
    return x


def doubled(net: Counts, x: Tensor) -> Tensor:
    net.calls *= 2
    return x


def guarded(net: Counts, x: Tensor) -> Tensor:
    try:
        return x * net.calls
    except Exception:
        return x


ASK: dict[str, Callable[[Counts, Tensor], Tensor]] = {
    "a late branch": lambda net, x: x if net.calls < 6 else x * 2,
    "every third": lambda net, x: x if net.calls % 3 else x * 2,
    "truth": lambda net, x: x * 2 if net.calls - 5 else x,
    "equality": lambda net, x: x * 2 if net.calls == 5 else x,
    "a factor": lambda net, x: x * net.calls,
    "a factor before": lambda net, x: net.calls * x,
    "a power": lambda net, x: x * 0.9**net.calls,
    "an addend": lambda net, x: x + net.calls,
    "an index": lambda net, x: x * [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13][net.calls],
    "a slice": lambda net, x: x * len("123456789"[: net.calls]),
    "a key": lambda net, x: x * {5: 2}.get(net.calls, 1),
    "a range": lambda net, x: x * sum(range(net.calls)),
    "a text": lambda net, x: x * len(f"{net.calls:5}" + "%d" % net.calls + str(net.calls)),  # noqa: UP031
    "a function": lambda net, x: x * math.sqrt(net.calls),
    "int": lambda net, x: x * int(net.calls),
    "float": lambda net, x: x * float(net.left),
    "bits": lambda net, x: x * net.calls.bit_length(),
    "maximum": lambda net, x: x * max(net.calls, 3),
    "a tensor": lambda net, x: x + torch.full((1,), net.calls, device=x.device),
    "another number": lambda net, x: x + net.calls + net.by_name["images"],
    "a type": lambda net, x: x * 2 if type(net.calls) is int else x,
    "guarded": guarded,
    "a copy": copied,
    "a list elsewhere": kept,
    "a product": doubled,
}


@pytest.fixture
def trained(opened: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Train a model; returns loss and hash after each step, the numbers it holds then, and how steps ran."""

    def run(kind: Callable[[], Counts], **changes: Any) -> tuple[Any, Any, str]:
        def model(self: ImageClassification) -> nn.Module:
            torch.manual_seed(0)
            SEEN.clear()
            return kind()

        monkeypatch.setattr(ImageClassification, "model", model)
        one = opened(TREE, **changes)
        losses = [
            (event.loss, checkpoint.sha(one.state().tensors))
            for event in one.train(wanted=lambda step: True)
            if isinstance(event, StepDone)
        ]
        modules: Any = one.stepper.passes.models().values()
        numbers = [(m.calls, m.left, m.by_name) for m in modules]
        return losses, numbers, one.stepper.capture

    return run


@pytest.mark.parametrize(("reduction", "replicas"), [("exact", 1), ("exact", 2), ("ddp", 1)])
def test_a_counter_goes_on_beside_a_graph(trained: Callable[..., Any], reduction: str, replicas: int) -> None:
    """With the numbers that it has without one, and shards and shorter batches are counted as they are."""
    expected = trained(Counts, capture=False, reduction=reduction, replicas=replicas)
    found = trained(Counts, reduction=reduction, replicas=replicas)
    assert found[:2] == expected[:2]
    assert found[2] == "graph"
    assert expected[1][0][0] == 9 * (1 if reduction == "ddp" else 2 // replicas)


@pytest.mark.parametrize("kind", [OfShorter, AsksLater, Uncounted])
def test_a_second_graph_asks_for_what_a_first_one_counts(trained: Callable[..., Any], kind: type[Counts]) -> None:
    expected = trained(kind, capture=False, reduction="ddp")
    found = trained(kind, reduction="ddp")
    assert found[:2] == expected[:2]
    assert found[2].startswith("eager: ")


@pytest.mark.parametrize("way", list(ASK))
def test_what_is_asked_for_is_no_counter(trained: Callable[..., Any], way: str) -> None:
    class Asks(Counts):
        def more(self, x: Tensor) -> Tensor:
            return ASK[way](self, x)

    changes = {"reduction": "ddp", "epochs": 2}
    expected = trained(Asks, capture=False, **changes)
    found = trained(Asks, **changes)
    assert found[:2] == expected[:2]
    assert found[2].startswith("eager: "), found[2]
    assert not SEEN or set(map(type, SEEN)) == {int}
