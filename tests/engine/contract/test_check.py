"""The contract check names what a model does that the engine cannot keep, and raises no alarm about what it can."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayexp.engine.contract.breach import Contract
from rayexp.engine.contract.draws import GlobalStates

Make = Callable[[], nn.Module]
Tried = Callable[..., Contract]


class Net(nn.Module):
    """A small classifier that calls `middle` on features fp32[n, 8]."""

    def __init__(self, middle: nn.Module | None = None, norm: nn.Module | None = None, outputs: int = 20) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.norm = norm or nn.BatchNorm2d(8)
        self.middle = nn.Identity() if middle is None else middle
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.norm(self.conv(x)).relu().mean((2, 3))))


def layer(forward: Callable[..., Tensor], **attributes: Any) -> Make:
    """A module `Layer` with these attributes (made anew for each) that computes `forward(self, x)`."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(8, 8)
            for name, make in attributes.items():
                value = make()
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, self.own(x))

    return Layer


# ---------------------------------------------------------------------- what is kept


class Shared(nn.Module):
    """One dropout and one linear layer under several names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Dropout(0.3)
        self.up = self.down = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.first(x)) + self.second(self.down(x)).relu()


class Remembering(nn.Module):
    """Keeps what nobody reads: a cache by shape, and the last features, for pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.ones: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return x * self.ones.setdefault(x.shape[1], torch.ones(x.shape[1], dtype=x.dtype))


class Patches(nn.Module):
    """Every patch goes through the same layers as a sample of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # [samples * 4, ...]
        features = self.norm(self.each(patches).mean((2, 3)))
        return self.head(features).unflatten(0, (len(x), -1)).mean(1)


class Activated(nn.BatchNorm2d):
    """A batch norm with what follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x)) * 3


def kept() -> dict[str, Make]:
    return {
        "plain": Net,
        "a batch norm that averages": lambda: Net(norm=nn.BatchNorm2d(8, momentum=None)),
        "an attribute dropout": lambda: Net(
            layer(lambda s, x: s.drop(x), dropout=lambda: 0.3, drop=lambda: nn.Dropout(0.3))()
        ),
        "a batch norm with more": lambda: Net(norm=Activated(8)),
        "shared": lambda: Net(Shared()),
        "remembering": lambda: Net(Remembering()),
        "layer norm": lambda: Net(nn.LayerNorm(8)),
        "group norm": lambda: Net(norm=nn.GroupNorm(2, 8)),
        "frozen": lambda: Net(nn.Linear(8, 8).requires_grad_(False)),
        "parametrized": lambda: Net(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
        "dropout along features": lambda: Net(layer(lambda s, x: s.drop(x.t()).t(), drop=lambda: nn.Dropout(0.3))()),
        "in float32 only": lambda: Net(layer(lambda s, x: x @ torch.eye(8))()),
        "not finite when moved": lambda: Net(layer(lambda s, x: x * s.root.sqrt(), root=zero_parameter)()),
        "zero at the start": lambda: zeroed(Net(nn.Linear(8, 8))),
        "patches as samples": Patches,
    }


def zero_parameter() -> nn.Parameter:
    return nn.Parameter(torch.full((8,), 1e-4))


def zeroed(net: Any) -> Any:
    nn.init.zeros_(net.head.weight)
    return net


@pytest.mark.parametrize("name", kept())
@pytest.mark.parametrize("reduction", ["exact", "ddp"])
def test_what_the_engine_keeps_is_not_refused(tried: Tried, name: str, reduction: str) -> None:
    found = tried(kept()[name], reduction=reduction)
    assert list(map(str, found.breaches)) == []
    assert len(found.checked) == 6


# ---------------------------------------------------------------------- what is refused


def functional(self: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(x, 0.3, self.training)


def cached(self: Any, x: Tensor) -> Tensor:
    before, self.kept = self.kept, x.detach().mean(0)
    return x if before is None else x + before


def counting(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return x / self.calls


SEEN: list[Tensor] = []


def shared_by_all(self: nn.Module, x: Tensor) -> Tensor:
    SEEN.append(x.detach().mean(0))
    return x + torch.stack(SEEN).mean(0)


def clamping(self: Any, x: Tensor) -> Tensor:
    self.own.weight.data.mul_(0.5)
    return x


def making(self: Any, x: Tensor) -> Tensor:
    if not hasattr(self, "late"):
        self.late = nn.Linear(8, 8)
    return x


def replacing(self: Any, x: Tensor) -> Tensor:
    self.own.bias = nn.Parameter(self.own.bias.detach().clone())
    return x


class Rough(torch.autograd.Function):
    """Sets the gradient of a weight by itself; where there is one already, it adds to it sample by sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        if weight.grad is None:
            weight.grad = grad.t() @ x
        else:
            for g, part in zip(grad, x, strict=True):
                weight.grad.add_(torch.outer(g, part))
        return grad @ weight, None


def rough(self: Any, x: Tensor) -> Tensor:
    return Rough.apply(x, self.matrix)


class Rerun(nn.Module):
    """A part that runs again in the backward pass, with dropout."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 8), layer)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False, preserve_rng_state=False)


def numbered(self: nn.Module, x: Tensor) -> Tensor:
    out = x.clone()
    out.put_(torch.arange(8), x.detach().flatten()[:8])
    return out


class Refused(torch.autograd.Function):
    """Has a gradient that PyTorch refuses, as CUDA's kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("scale_backward does not have a deterministic implementation, but you set ...")


def fresh(forward: Callable[..., Tensor], **attributes: Any) -> Make:
    def make() -> nn.Module:
        SEEN.clear()
        return Net(nn.Sequential(nn.Linear(8, 8), layer(forward, **attributes)()))

    return make


NUMPY = np.random.default_rng(0)
REFUSED: dict[str, tuple[Make, str]] = {
    "functional dropout": (fresh(functional), r"middle\.1 \(Layer\) draws from PyTorch's global generator"),
    "torch": (fresh(lambda s, x: x + torch.rand(8, dtype=x.dtype)), r"middle\.1 \(Layer\) draws from PyTorch's global"),
    "numpy": (fresh(lambda s, x: x * np.random.rand()), r"middle\.1 \(Layer\) draws from numpy's global generator"),
    "random": (fresh(lambda s, x: x * random.random()), r"middle\.1 \(Layer\) draws from Python's global generator"),
    "its own generator": (fresh(lambda s, x: x * NUMPY.random()), r"middle\.1 \(Layer\) makes something else of the"),
    "a cache": (
        fresh(cached, kept=lambda: None),
        r"middle\.1 \(Layer\) makes something else of the same samples after",
    ),
    "a counter": (fresh(counting, calls=lambda: 0), r"middle\.1 \(Layer\) makes something else of the same samples"),
    "a global": (fresh(shared_by_all), r"middle\.1 \(Layer\) makes something else of the same samples after others"),
    "an average of weights": (
        fresh(lambda s, x: x + s.ema.mul_(0.9), ema=lambda: torch.ones(8)),
        r"training writes the buffer middle\.1\.ema",
    ),
    "a counting buffer": (
        fresh(lambda s, x: (s.seen.add_(1), x)[1], seen=lambda: torch.zeros((), dtype=torch.int64)),
        r"training writes the buffer middle\.1\.seen",
    ),
    "the batch's deviation": (
        fresh(lambda s, x: x / x.std(0)),
        r"what middle\.1 \(Layer\) makes of a sample depends on",
    ),
    "the batch's size": (fresh(lambda s, x: x / x.shape[0]), r"what middle\.1 \(Layer\) makes of a sample depends on"),
    "the batch's size, behind zeros": (
        lambda: zeroed(
            fresh(
                lambda s, x: x + s.gamma * (x / x.shape[0] if s.training else x),
                gamma=lambda: nn.Parameter(torch.zeros(8)),
            )()
        ),
        r"what middle\.1 \(Layer\) makes of a sample depends on",
    ),
    "the batch's size, in float32 only": (
        fresh(lambda s, x: x @ torch.eye(8) / (x.shape[0] if s.training else 1)),
        r"what middle\.1 \(Layer\) makes of a sample depends on",
    ),
    "a cache, in evaluation": (
        fresh(lambda s, x: x if s.training else cached(s, x), kept=lambda: None),
        r"in evaluation, middle\.1 \(Layer\) makes something else of the same samples after others",
    ),
    "dropout, in evaluation": (
        fresh(lambda s, x: x if s.training else F.dropout(x, 0.3)),
        r"middle\.1 \(Layer\) draws from PyTorch's global generator in evaluation",
    ),
    "the batch's mean, in evaluation": (
        fresh(lambda s, x: x if s.training else x - x.mean(0)),
        r"in evaluation, what it makes of a sample depends on the others",
    ),
    "a batch norm without statistics": (
        lambda: Net(norm=nn.BatchNorm2d(8, track_running_stats=False)),
        r"in evaluation, what it makes of a sample depends on the others",
    ),
    "changed weights": (fresh(clamping), r"a pass changes the parameter middle\.1\.own\.weight"),
    "late parameters": (fresh(making), r"a pass makes the parameter middle\.1\.late\.weight"),
    "other parameters": (fresh(replacing), r"a pass replaces the parameter middle\.1\.own\.bias"),
    "a gradient in parts": (
        fresh(rough, matrix=lambda: nn.Parameter(torch.eye(8))),
        r"the gradient of middle\.1\.matrix is added in several parts, between which another shard's comes",
    ),
    "dropout, run again": (lambda: Net(Rerun(nn.Dropout(0.3))), r"middle\.layer\.1 \(Dropout\) runs again in the back"),
    "a batch norm, run again": (lambda: Net(Rerun(nn.BatchNorm1d(8))), r"the batch norm middle\.layer\.1 runs 2 times"),
    "no kernel": (fresh(numbered), r"put_ in middle\.1 \(Layer\) has no deterministic kernel for cpu"),
    "no kernel of a gradient": (
        fresh(lambda s, x: Refused.apply(x)),
        r"scale_backward in middle\.1 \(Layer\) has no deterministic kernel for cpu",
    ),
    "no gradient": (
        fresh(lambda s, x: x.detach()),
        r"the parameter conv\.weight gets no gradient.*\(likewise conv\.bias, norm\.weight, norm\.bias and 4 more\)",
    ),
    "an error": (fresh(lambda s, x: x[:, 99]), r"a pass over 4 samples fails in middle\.1 \(Layer\): IndexError"),
}
NOTES = ("no gradient",)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_cannot_keep_is_refused_by_name(tried: Tried, name: str) -> None:
    make, message = REFUSED[name]
    found = tried(make)
    lines = list(map(str, found.warnings if name in NOTES else found.refused))
    assert [line for line in lines if says(message, line)], lines
    assert all("; allowed: " in line for line in lines)


def says(pattern: str, line: str) -> bool:
    return re.search(rf"^(model|workload): .*{pattern}", line) is not None


@pytest.mark.parametrize("name", ["functional dropout", "a cache", "the batch's size"])
def test_ddp_warns_of_what_only_exact_refuses(tried: Tried, name: str) -> None:
    make, message = REFUSED[name]
    found = tried(make, reduction="ddp")
    assert found.refused == []
    assert any(says(message, str(breach)) for breach in found.warnings)


@pytest.mark.parametrize("name", ["a counting buffer", "changed weights"])
def test_ddp_refuses_what_cannot_be_trained(tried: Tried, name: str) -> None:
    make, message = REFUSED[name]
    assert any(says(message, str(breach)) for breach in tried(make, reduction="ddp").refused)


def test_all_is_named_and_not_only_what_comes_first(tried: Tried) -> None:
    def make() -> nn.Module:
        first = layer(functional)()
        second = layer(lambda s, x: (s.seen.add_(1), x)[1], seen=lambda: torch.zeros(()))()
        third = layer(clamping)()
        return Net(nn.Sequential(first, second, third))

    lines = "\n".join(map(str, tried(make).refused))
    for part in ("middle.0 (Layer) draws", "the buffer middle.1.seen", "the parameter middle.2.own.weight"):
        assert part in lines


def test_a_draw_is_named_once_and_is_no_state(tried: Tried) -> None:
    (found,) = tried(fresh(lambda s, x: x + torch.rand(8) if s.training else x)).refused
    assert "draws from PyTorch's global generator" in str(found)


def test_what_is_true_of_several_modules_is_said_once(tried: Tried) -> None:
    def draws(self: nn.Module, x: Tensor) -> Tensor:
        return x + torch.rand(8, dtype=x.dtype) if self.training else x

    def make() -> nn.Module:
        return Net(nn.Sequential(*(layer(functional)() for _ in range(4)), layer(draws)()))

    (found,) = tried(make).refused
    assert str(found).startswith("model: middle.0 (Layer) draws from PyTorch's global generator")
    assert "(likewise middle.1, middle.2, middle.3 and 1 more); allowed: " in str(found)
    assert found.to_json()["others"] == [f"middle.{i}" for i in range(1, 5)]
    (found,) = tried(fresh(functional)).refused
    assert "likewise" not in str(found)
    assert "others" not in found.to_json()


def test_unused_parameters_and_counters_are_noted(tried: Tried) -> None:
    def counted(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return x

    def make() -> nn.Module:
        net = Net(layer(counted, calls=lambda: 0)())
        net.spare = nn.Linear(2, 2)
        return net

    found = tried(make)
    assert found.refused == []
    text = "\n".join(map(str, found.warnings))
    assert "the parameter spare.weight gets no gradient" in text
    assert "passes change the attribute middle.calls (0 -> 6)" in text


def test_a_sparse_gradient_is_refused_by_name(tried: Tried) -> None:
    def looked_up(self: Any, x: Tensor) -> Tensor:
        return x + self.table((x.detach().mean(1) > 0).long())

    (found,) = tried(fresh(looked_up, table=lambda: nn.Embedding(2, 8, sparse=True))).refused
    assert str(found).startswith("model: the gradient of middle.1.table.weight is sparse")
    assert str(found).endswith("allowed: sparse=False there")


@pytest.mark.parametrize("make", [Net, fresh(functional), fresh(lambda s, x: x * random.random() * np.random.rand())])
def test_nothing_is_left_changed(tried: Tried, make: Make) -> None:
    device = torch.device("cpu")
    before = GlobalStates.now(device)
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    tried(make)
    assert GlobalStates.now(device).moved(before) == []
    assert (torch.get_num_threads(), torch.get_deterministic_debug_mode()) == (threads, mode)
