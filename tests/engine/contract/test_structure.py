"""What a model must be before any shard goes through it: its layers and tensors, its builds, and its copies."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rayexp.engine.contract import structure
from rayexp.engine.contract.breach import Contract

Make = Callable[[], nn.Module]
Tried = Callable[..., Contract]


class Net(nn.Module):
    """A small classifier."""

    def __init__(self, middle: nn.Module | None = None, norm: nn.Module | None = None, outputs: int = 20) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.norm = norm or nn.BatchNorm2d(8)
        self.middle = nn.Identity() if middle is None else middle
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.norm(self.conv(x)).relu().mean((2, 3))))


def holding(**attributes: Any) -> nn.Module:
    """A layer with these attributes."""
    layer = nn.Linear(8, 8)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


class Frozen(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


class DataParallel(nn.Module):  # by its name
    def __init__(self) -> None:
        super().__init__()
        self.module = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Wrapped(DataParallel):
    pass


class FrozenOverWorkers(nn.SyncBatchNorm):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


def tied_by_memory() -> nn.Module:
    net = Net(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    net.middle[1].weight.data = net.middle[0].weight.data
    return net


def floats(kind: torch.dtype) -> Make:
    return lambda: Net(nn.Linear(8, 8).to(kind))


def scaled(net: Net) -> Net:
    with torch.no_grad():
        net.head.weight.mul_(1 + np.random.rand())
    return net


def lambdas() -> nn.Module:
    net = Net()
    net.extra = nn.Linear(8, 8)
    inner = net.extra
    net.middle.forward = lambda x: inner(x)  # type: ignore[method-assign]
    return net


def hooked() -> nn.Module:
    net = Net()
    net.head.weight.register_hook(lambda gradient: gradient * 0.5)
    return net


class Held(Net):
    """A lambda that refers to the module computes everything."""

    def __init__(self) -> None:
        super().__init__(norm=nn.GroupNorm(2, 8))
        self.work = lambda x: Net.forward(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.work(x)


class Tupled(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


REFUSED: dict[str, tuple[Make, str]] = {
    "float64": (
        floats(torch.float64),
        r"the parameter middle\.weight is float64 \(likewise middle\.bias\); allowed: float32",
    ),
    "bfloat16": (floats(torch.bfloat16), r"the parameter middle\.weight is bfloat16"),
    "complex": (floats(torch.complex64), r"the parameter middle\.weight is complex64"),
    "integers": (
        lambda: Net(holding(scale=nn.Parameter(torch.ones(8, dtype=torch.int64), requires_grad=False))),
        r"the parameter middle\.scale is int64; allowed: float32, or a buffer",
    ),
    "two parameters of one memory": (
        tied_by_memory,
        r"the parameters middle\.0\.weight and middle\.1\.weight share memory",
    ),
    "a lazy layer": (lambda: Net(nn.LazyLinear(8)), r"middle \(LazyLinear\) does not know its size before"),
    "a compiled layer": (lambda: Net(torch.compile(nn.Linear(8, 8))), r"middle \(OptimizedModule\) is compiled"),
    "a wrapper": (DataParallel, r"the model \(DataParallel\) cuts the batch once more"),
    "a child of a wrapper": (Wrapped, r"the model \(Wrapped\) cuts the batch once more"),
    "no copy": (lambda: Net(holding(gen=threading.Lock())), r"middle \(Linear\) cannot be copied, because .* gen "),
    "dropout of maps": (lambda: Net(nn.Dropout1d()), r"middle \(Dropout1d\) has no form with draws per shard"),
    "a batch norm in eval mode": (lambda: Net(norm=Frozen(8)), r"the batch norm norm \(Frozen\) stays in eval mode"),
    "a batch norm over workers": (lambda: Net(norm=nn.SyncBatchNorm(8)), r"norm \(SyncBatchNorm\) normalises over all"),
    "other builds": (lambda: scaled(Net()), r"built twice, it begins from another head\.weight"),
    "a lambda": (lambdas, r"a copy does not use its parameter extra\.weight"),
    "hooks of a parameter": (hooked, r"a copy computes another gradient of head\.weight: hooks of parameters"),
    "a lambda for everything": (
        Held,
        r"a copy uses none of its parameters, since something in it holds the original's",
    ),
    "a tuple": (Tupled, r"it returns a tuple of 2 of 4 images and 20 classes; allowed: float32 \[4, 20\]"),
    "too many outputs": (lambda: Net(outputs=21), r"it returns float32 \[4, 21\] of 4 images and 20 classes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_must_not_be_is_refused_by_name(tried: Tried, name: str) -> None:
    make, message = REFUSED[name]
    lines = list(map(str, tried(make).refused))
    assert [line for line in lines if says(message, line)], lines
    assert all("; allowed: " in line for line in lines)


def says(pattern: str, line: str) -> bool:
    return re.search(rf"^model: .*{pattern}", line) is not None


@pytest.mark.parametrize("name", ["float64", "a lambda", "a tuple"])
def test_ddp_refuses_what_cannot_be_trained(tried: Tried, name: str) -> None:
    make, message = REFUSED[name]
    assert any(says(message, str(breach)) for breach in tried(make, reduction="ddp").refused)


def test_ddp_warns_of_a_batch_norm_over_workers(tried: Tried) -> None:
    make, message = REFUSED["a batch norm over workers"]
    found = tried(make, reduction="ddp")
    assert found.refused == []
    assert any(says(message, str(breach)) for breach in found.warnings)


def test_each_fault_of_a_layer_is_a_sentence_of_its_own() -> None:
    found, fatal = structure.inspect(Net(norm=FrozenOverWorkers(8)))
    assert not fatal
    which = "the batch norm norm (FrozenOverWorkers)"
    assert [breach.what for breach in found] == [
        f"{which} normalises over all workers, which have other shards with another number of them",
        f"{which} stays in eval mode while training, and its running statistics belong to the shard then",
    ]
