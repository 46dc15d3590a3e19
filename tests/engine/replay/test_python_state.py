"""A model whose Python does more than to launch kernels: a graph must not make another model of it."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rayexp.engine import checkpoint
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.errors import UserError
from rayexp.workloads.image_classification.workload import ImageClassification

CPU = torch.device("cpu")
TREE: dict[str, Any] = {  # three steps an epoch, the last one of half a batch
    "data": {"name": "shapes", "max_train_samples": 20, "max_val_samples": 8, "image_size": 8, "augment": None},
    "batch_size": 8,
    "shards": 2,
    "lr": 0.05,
}


class Net(nn.Module):
    """A small classifier that calls `middle` on features fp32[n, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 20)
        self.prepare()

    def prepare(self) -> None:
        pass

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(self.middle(x) if self.training else x)


class Counter(Net):
    def prepare(self) -> None:
        self.calls = 0

    def middle(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2 if self.calls > 5 else x


class WithinAnObject(Net):
    def prepare(self) -> None:
        self.own = SimpleNamespace(parts=[{"calls": np.zeros(1)}])

    def middle(self, x: Tensor) -> Tensor:
        self.own.parts[0]["calls"] += 1
        return x * float(self.own.parts[0]["calls"][0])


class Bank(Net):
    def prepare(self) -> None:
        self.bank: list[int] = []

    def middle(self, x: Tensor) -> Tensor:
        self.bank.append(len(x))
        return x * len(self.bank)


class HostDraw(Net):
    def middle(self, x: Tensor) -> Tensor:
        return x * float(torch.rand(1).numpy()[0])


class OwnDraw(Net):
    def prepare(self) -> None:
        self.luck = random.Random(0)

    def middle(self, x: Tensor) -> Tensor:
        return x * self.luck.random()


class NumpyDraw(Net):
    def prepare(self) -> None:
        self.luck = np.random.default_rng(0)

    def middle(self, x: Tensor) -> Tensor:
        return x * self.luck.random()


class Previous(Net):
    def prepare(self) -> None:
        self.previous: Tensor | None = None

    def middle(self, x: Tensor) -> Tensor:
        last, self.previous = self.previous, x.detach().mean()
        return x if last is None else x + last


class OfClass(Net):
    calls = 0

    def prepare(self) -> None:
        OfClass.calls = 0

    def middle(self, x: Tensor) -> Tensor:
        OfClass.calls += 1
        return x * 2 if OfClass.calls > 5 else x


CALLS = 0


class Global(Net):
    def prepare(self) -> None:
        global CALLS
        CALLS = 0

    def middle(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        return x * 2 if CALLS > 5 else x


class InSlots(Net):
    class Slots:
        __slots__ = ("__calls",)

        def __init__(self) -> None:
            self.__calls = 0

        def next(self) -> int:
            self.__calls += 1
            return self.__calls

    def prepare(self) -> None:
        self.own = InSlots.Slots()

    def middle(self, x: Tensor) -> Tensor:
        return x * 2 if self.own.next() > 5 else x


class Cools(Net):
    """`np.exp` and the like make numbers of their own type."""

    def prepare(self) -> None:
        self.warmth = np.float64(1)

    def middle(self, x: Tensor) -> Tensor:
        self.warmth *= np.exp(np.float64(-0.1))
        return x * 2 if self.warmth < 0.6 else x


class Hooked(Net):
    def prepare(self) -> None:
        calls = 0

        def hook(module: nn.Module, given: Any, made: Tensor) -> Tensor:
            nonlocal calls
            calls += module.training
            return made * 2 if calls > 5 else made

        self.conv.register_forward_hook(hook)


class OfFunction(Net):
    def prepare(self) -> None:
        def factor(seen: list[int] = []) -> float:  # noqa: B006
            seen.append(1)
            return 2.0 if len(seen) > 5 else 1.0

        self.factor = functools.partial(factor)

    def middle(self, x: Tensor) -> Tensor:
        return x * self.factor()


class Endless(Net):
    def prepare(self) -> None:
        self.factors = itertools.cycle([1.0, 2.0, 3.0])

    def middle(self, x: Tensor) -> Tensor:
        return x * next(self.factors)


class Generates(Net):
    def prepare(self) -> None:
        factors = (float(i) for i in range(1, 100))
        self.factor = lambda: next(factors)

    def middle(self, x: Tensor) -> Tensor:
        return x * self.factor()


class Mask(Net):
    """The last batch of an epoch takes the place of what the first graph reads."""

    def prepare(self) -> None:
        self.mask: Tensor | None = None

    def middle(self, x: Tensor) -> Tensor:
        if self.mask is None or len(self.mask) != len(x):
            self.mask = torch.linspace(0.5, 1.5, len(x), device=x.device)[:, None]
        return x * self.mask


@functools.lru_cache(maxsize=1)
def ramp(size: int, device: torch.device) -> Tensor:
    return torch.linspace(0.5, 1.5, size, device=device)[:, None]


class Cached(Net):
    """Nothing of the model's refers to what it reads."""

    def middle(self, x: Tensor) -> Tensor:
        return x * ramp(len(x), x.device)


class AsBuffer(Net):
    """It looks as if training wrote no buffer: the first batch has this size."""

    def prepare(self) -> None:
        self.register_buffer("mask", torch.linspace(0.5, 1.5, 8)[:, None], persistent=False)

    def middle(self, x: Tensor) -> Tensor:
        if len(self.mask) != len(x):
            self.mask = torch.linspace(0.5, 1.5, len(x), device=x.device)[:, None]
        return x * self.mask


class Kept(Net):
    """For somebody to look at."""

    def middle(self, x: Tensor) -> Tensor:
        self.seen = [x, {"share": x.softmax(1)}]
        return x * self.seen[1]["share"]  # type: ignore[index]


@pytest.fixture
def trained(opened: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Train a model; returns loss and hash after each step, and the trainer."""

    def run(kind: type[nn.Module], **changes: Any) -> tuple[list[tuple[float, str]], Trainer]:
        def model(self: ImageClassification) -> nn.Module:
            torch.manual_seed(0)
            return kind()

        monkeypatch.setattr(ImageClassification, "model", model)
        one = opened(TREE, **changes)
        torch.manual_seed(1)
        return [
            (event.loss, checkpoint.sha(one.state().tensors))
            for event in one.train(wanted=lambda step: True)
            if isinstance(event, StepDone)
        ], one

    return run


def assert_eager(trained: Callable[..., Any], kind: type[Net], reason: str) -> None:
    """A model's steps run as they stand, for this reason and with the right bits; where they must not, that is told."""
    expected, _ = trained(kind, capture=False, reduction="ddp")
    found, one = trained(kind, reduction="ddp")
    assert one.stepper.capture == f"eager: {reason}"
    assert found == expected
    with pytest.raises(UserError, match="capture: true, and this step cannot be captured"):
        trained(kind, capture=True, reduction="ddp")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Counter, "a step changes model.calls"),
        (WithinAnObject, "a step changes model.own.parts[0]['calls']"),
        (Bank, "a step changes len(model.bank)"),
        (HostDraw, "a step draws from PyTorch's global generator on the host"),
        (OwnDraw, "a step changes model.luck"),
        (NumpyDraw, "a step changes model.luck"),
        (Previous, "a step reads model.previous and puts another tensor there"),
        (OfClass, "a step changes OfClass.calls"),
        (Global, f"a step changes {__name__}.CALLS"),
        (InSlots, "a step changes model.own._Slots__calls"),
        (Cools, "a step changes model.warmth"),
        (Hooked, "a step changes calls of a hook of model.conv"),
        (OfFunction, "a step changes len(model.factor)"),
    ],
)
def test_what_a_graph_would_not_repeat_runs_eagerly(trained: Callable[..., Any], kind: type[Net], why: str) -> None:
    assert_eager(trained, kind, f"{why}, which a graph does not repeat")


@pytest.mark.parametrize(("kind", "name"), [(Endless, "model.factors"), (Generates, "factors of model.factor")])
def test_an_iterator_is_not_moved_by_a_capture(trained: Callable[..., Any], kind: type[Net], name: str) -> None:
    """Nor could it be moved back."""
    assert_eager(trained, kind, f"{name} is an iterator, which a graph does not move on")


class BySize(Net):
    """A shorter batch gets an entry of its own."""

    def prepare(self) -> None:
        self.masks: dict[int, Tensor] = {}

    def middle(self, x: Tensor) -> Tensor:
        if len(x) not in self.masks:
            self.masks[len(x)] = torch.linspace(0.5, 1.5, len(x), device=x.device)[:, None]
        return x * self.masks[len(x)]


@pytest.mark.parametrize(
    ("kind", "replicas"), [*itertools.product([Mask, BySize, Cached, Kept], [1, 2]), (AsBuffer, 1)]
)
def test_what_a_model_keeps_may_be_kept_beside_graphs(
    trained: Callable[..., Any], kind: type[Net], replicas: int
) -> None:
    expected, _ = trained(kind, capture=False, reduction="ddp")
    found, one = trained(kind, reduction="ddp", replicas=replicas)
    assert one.stepper.capture == "graph"
    if replicas == 1:
        assert found == expected
    one.stepper.programs._forget_graphs()
    assert one.stepper.programs._kept == []


class Remembers(Net):
    """The first shorter batch changes what becomes of all later ones."""

    def prepare(self) -> None:
        self.shorter = False

    def middle(self, x: Tensor) -> Tensor:
        self.shorter = self.shorter or len(x) < 8
        return x * 2 if self.shorter else x


class OfEvaluations(Net):
    """An evaluation changes what becomes of the next epoch."""

    done = 0

    def prepare(self) -> None:
        OfEvaluations.done = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            OfEvaluations.done += 1
        return super().forward(x * (1 + OfEvaluations.done) if self.training else x)


@pytest.mark.parametrize(("kind", "name"), [(Remembers, "model.shorter"), (OfEvaluations, "OfEvaluations.done")])
def test_what_changes_beside_graphs_ends_them(trained: Callable[..., Any], kind: type[Net], name: str) -> None:
    """In time: the steps before have been right."""
    assert_eager(trained, kind, f"something changes {name}, which a graph does not see")


class CountsAndAsks(Counter):
    def middle(self, x: Tensor) -> Tensor:
        x = super().middle(x)
        return x * (2.0 if x.sum().item() > 0 else 1.0)


def test_a_capture_that_fails_leaves_python_as_it_was(trained: Callable[..., Any]) -> None:
    expected, eager = trained(CountsAndAsks, capture=False)
    found, one = trained(CountsAndAsks)
    assert "asks for a value" in one.stepper.capture
    assert found == expected
    calls = [each.stepper.passes.replicas[0].model.module.calls for each in (eager, one)]
    assert calls[0] == calls[1] > 5


def test_what_cannot_be_captured_is_told_with_its_line(opened: Callable[..., Trainer], tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(
        "import torch\n\ndef small(num_classes):\n    return Asks(3 * 64, num_classes)\n\n"
        "class Asks(torch.nn.Linear):\n    def forward(self, x):\n        x = super().forward(x.flatten(1))\n"
        "        return x if x.sum() > 0 else 2 * x\n"
    )
    tree = {**TREE, "model": {"name": "asks.py:small"}, "code": [str(tmp_path / "asks.py")]}
    one = opened(tree, epochs=1)
    list(one.train())
    assert one.stepper.capture.startswith("eager: ")
    assert one.stepper.capture.endswith(f"asks for a value, line 9 of {tmp_path / 'asks.py'}")
