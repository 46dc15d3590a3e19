"""A model whose Python does more than to launch kernels: a graph must not make another model of it."""

from __future__ import annotations

import functools
import itertools
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rayexp.engine import checkpoint
from rayexp.engine.python_state import MOST, CaptureWatch, PythonState
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
    ],
)
def test_what_a_graph_would_not_repeat_runs_eagerly(trained: Callable[..., Any], kind: type[Net], why: str) -> None:
    expected, _ = trained(kind, capture=False, reduction="ddp")
    found, one = trained(kind, reduction="ddp")
    assert one.stepper.capture == f"eager: {why}, which a graph does not repeat"
    assert found == expected
    with pytest.raises(UserError, match="capture: true, and this step cannot be captured"):
        trained(kind, capture=True, reduction="ddp")


@pytest.mark.parametrize(("kind", "replicas"), [*itertools.product([Mask, Cached, Kept], [1, 2]), (AsBuffer, 1)])
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


# ---------------------------------------------------------------------- what is seen, and brought back


class Part:
    """An object of the user's."""

    def __init__(self) -> None:
        self.number, self.word, self.nothing = 1, "a", None
        self.items, self.line, self.members = [1, [2]], deque([1, 2], maxlen=2), {1, 2}
        self.named = {"a": 1, "b": {"c": 2}}
        self.array, self.data = np.arange(3), np.arange(MOST + 1)
        self.luck, self.legacy = random.Random(0), np.random.RandomState(0)
        self.generator, self.host = torch.Generator(), torch.zeros(3)
        self.pair = ([1], 2)
        self.me = self


CHANGES: dict[str, Callable[[Part], object]] = {
    "number": lambda p: setattr(p, "number", 2),
    "kind": lambda p: setattr(p, "number", 1.0),
    "word": lambda p: setattr(p, "word", "b"),
    "nothing": lambda p: setattr(p, "nothing", 0),
    "new": lambda p: setattr(p, "new", 1),
    "gone": lambda p: delattr(p, "number"),
    "items": lambda p: p.items.append(3),
    "another list": lambda p: setattr(p, "items", [2, [2]]),
    "inner": lambda p: p.items[1].__setitem__(0, 3),  # type: ignore[index]
    "line": lambda p: p.line.append(3),
    "members": lambda p: p.members.add(3),
    "named": lambda p: p.named.update(d=1),
    "deep": lambda p: p.named["b"].update(c=3),  # type: ignore[attr-defined]
    "array": lambda p: p.array.__iadd__(1),
    "luck": lambda p: p.luck.random(),
    "legacy": lambda p: p.legacy.rand(),
    "generator": lambda p: torch.rand(1, generator=p.generator),
    "host": lambda p: p.host.add_(1),
    "in a pair": lambda p: p.pair[0].append(1),
    "python": lambda p: random.random(),
    "numpy": lambda p: np.random.rand(),
    "torch": lambda p: torch.rand(1),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_change_is_seen_and_brought_back(name: str) -> None:
    part, device = Part(), torch.device("cuda")
    before = PythonState({"part": part}, device)
    assert list(PythonState({"part": part}, device).changed(before)) == []
    held = dict(vars(part))
    CHANGES[name](part)
    assert len(list(PythonState({"part": part}, device).changed(before))) >= 1
    before.restore()
    assert list(PythonState({"part": part}, device).changed(before)) == []
    assert all(vars(part)[key] is value for key, value in held.items())
    assert vars(part).keys() == held.keys()


def test_what_is_data_or_a_librarys_is_left_alone() -> None:
    part = SimpleNamespace(rows=list(range(MOST + 1)), big=np.zeros(MOST + 1), kind=Part, count=itertools.count())
    before = PythonState({"part": part}, CPU)
    part.rows[0] = -1
    part.big += 1
    next(part.count)
    assert list(PythonState({"part": part}, CPU).changed(before)) == []
    before.restore()
    assert (part.rows[0], part.big[0]) == (-1, 1)


def test_a_watch_tells_what_was_read_from_what_was_made() -> None:
    part = SimpleNamespace(one=torch.ones(3), other=torch.ones(3), size=torch.ones(2))
    apart, asked = torch.ones(4), torch.ones(4)
    with CaptureWatch({"part": part}, CPU) as watch:
        made = part.one * 2
        made = made + made[:2].sum() + len(asked) + len(part.size)
        apart[:2].mul_(2)
        part.other, part.size = made, made
    watch.refuse()
    tensors = part.one, apart, asked, part.other, part.size, made
    kept = [any(each is one for one in watch.read()) for each in tensors]
    assert kept == [True, True, False, False, False, False]
    assert (len(part.other), len(part.size)) == (3, 2)
    with CaptureWatch({"part": part}, CPU) as watch:
        part.other = part.other * 2
    with pytest.raises(RuntimeError, match=r"a step reads part.other and puts another tensor there, which a graph"):
        watch.refuse()


def test_nothing_that_a_graph_reads_holds_a_backward_pass() -> None:
    weight = torch.ones(3, requires_grad=True)
    part = SimpleNamespace(kept=weight * 2, listed=[weight * 2], named={"a": weight * 2})
    with CaptureWatch({"part": part}, CPU) as watch:
        part.kept.sum(), part.listed[0].sum(), part.named["a"].sum(), weight.sum()
    assert all(tensor.grad_fn is None for tensor in (part.kept, part.listed[0], part.named["a"], *watch.read()))
    assert len(watch.read()) == 4  # and not what the sums were made of
