"""The contract check names what a model does that the engine cannot keep, and raises no alarm about what it can."""

from __future__ import annotations

import functools
import random
import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayexp.config import ExperimentConfig, parse
from rayexp.data import open_data
from rayexp.engine import runtime
from rayexp.engine.contract.breach import Contract
from rayexp.engine.contract.check import check, is_shipped
from rayexp.engine.contract.draws import GlobalStates
from rayexp.workloads import open_workload
from rayexp.workloads.image_classification.workload import ImageClassification

Make = Callable[[], nn.Module]
Tried = Callable[..., Contract]
TREE: dict[str, Any] = {
    "data": {"name": "shapes", "max_train_samples": 80, "max_val_samples": 20, "image_size": 32},
    "batch_size": 16,
    "shards": 4,
    "lr": 0.05,
}


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


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Tried:
    """Check a model of one's own."""

    def run(make: Make, **changes: Any) -> Contract:
        def model(self: ImageClassification) -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return make()

        monkeypatch.setattr(ImageClassification, "model", model)
        return examined(parse({**TREE, **changes}, ExperimentConfig, "test"))

    return run


def examined(config: ExperimentConfig) -> Contract:
    with runtime.configure(config, torch.device("cpu"), config.shards, 1) as configured:
        return check(config, lambda sized: open_workload(sized, opened(sized.data)), configured)


@functools.cache
def opened(data: Any) -> Any:
    """Data that several checks take."""
    return open_data(data)


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


def kept() -> dict[str, Make]:
    return {
        "plain": Net,
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


LANGUAGE = {
    "workload": "language_model",
    "data": {"name": "python_docs", "max_train_tokens": 3000, "max_val_tokens": 600, "bptt": 12},
    "batch_size": 16,
    "shards": 4,
}
SIZES = {"emsize": 8, "nhid": 8, "nlayers": 2, "dropout": 0.2}


@pytest.mark.parametrize("name", ["rnn_tanh", "rnn_relu", "lstm", "gru", "transformer"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_language_models_keep_to_it(name: str, tied: bool) -> None:
    model = {"name": name, **SIZES, "tied": tied}
    if name == "transformer":
        model = {"name": name, "emsize": 16, "nhead": 2, "nhid": 16, "nlayers": 2, "tied": tied}
    found = examined(parse({**LANGUAGE, "model": model}, ExperimentConfig, "test"))
    assert list(map(str, found.breaches)) == []
    assert len(found.checked) == 6


FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet50",
    "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32",
    "wide_resnet50_2",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES),
    ],
)
def test_torchvisions_models_keep_to_it(name: str) -> None:
    size = 96 if name == "inception_v3" else 64
    tree = {**TREE, "model": {"name": name}, "data": {**TREE["data"], "image_size": size}}
    found = examined(parse(tree, ExperimentConfig, "test"))
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


def tied_by_memory() -> nn.Module:
    net = Net(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    net.middle[1].weight.data = net.middle[0].weight.data
    return net


class Rerun(nn.Module):
    """A part that runs again in the backward pass, with dropout."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 8), layer)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False, preserve_rng_state=False)


class Activated(nn.BatchNorm2d):
    """A batch norm with what follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x)) * 3


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


def numbered(self: nn.Module, x: Tensor) -> Tensor:
    out = x.clone()
    out.put_(torch.arange(8), x.detach().flatten()[:8])
    return out


def floats(kind: torch.dtype) -> Make:
    return lambda: Net(nn.Linear(8, 8).to(kind))


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
    "float64": (floats(torch.float64), r"the parameter middle\.weight is float64; allowed: float32"),
    "bfloat16": (floats(torch.bfloat16), r"the parameter middle\.weight is bfloat16"),
    "complex": (floats(torch.complex64), r"the parameter middle\.weight is complex64"),
    "integers": (
        fresh(
            lambda s, x: x * s.scale, scale=lambda: nn.Parameter(torch.ones(8, dtype=torch.int64), requires_grad=False)
        ),
        r"the parameter middle\.1\.scale is int64; allowed: float32, or a buffer",
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
    "a lambda": (lambdas, r"a copy does not use its parameter extra\.weight"),
    "hooks of a parameter": (hooked, r"a copy computes another gradient of head\.weight: hooks of parameters"),
    "two parameters of one memory": (
        tied_by_memory,
        r"the parameters middle\.0\.weight and middle\.1\.weight share memory",
    ),
    "a lazy layer": (lambda: Net(nn.LazyLinear(8)), r"middle \(LazyLinear\) does not know its size before"),
    "a compiled layer": (lambda: Net(torch.compile(nn.Linear(8, 8))), r"middle \(OptimizedModule\) is compiled"),
    "a wrapper": (DataParallel, r"the model \(DataParallel\) cuts the batch once more"),
    "a child of a wrapper": (Wrapped, r"the model \(Wrapped\) cuts the batch once more"),
    "a lambda for everything": (
        Held,
        r"a copy uses none of its parameters, since something in it holds the original's",
    ),
    "no copy": (fresh(lambda s, x: x, gen=threading.Lock), r"middle\.1 \(Layer\) cannot be copied, because .* gen "),
    "dropout of maps": (lambda: Net(nn.Dropout1d()), r"middle \(Dropout1d\) has no form with draws per shard"),
    "dropout, run again": (lambda: Net(Rerun(nn.Dropout(0.3))), r"middle\.layer\.1 \(Dropout\) runs again in the back"),
    "a batch norm, run again": (lambda: Net(Rerun(nn.BatchNorm1d(8))), r"the batch norm middle\.layer\.1 runs 2 times"),
    "a batch norm in eval mode": (lambda: Net(norm=Frozen(8)), r"the batch norm norm \(Frozen\) stays in eval mode"),
    "a batch norm without momentum": (
        lambda: Net(norm=nn.BatchNorm2d(8, momentum=None)),
        r"the batch norm norm \(BatchNorm2d\) averages over all batches",
    ),
    "a batch norm over workers": (lambda: Net(norm=nn.SyncBatchNorm(8)), r"norm \(SyncBatchNorm\) normalises over all"),
    "no kernel": (fresh(numbered), r"put_ in middle\.1 \(Layer\) has no deterministic kernel for cpu"),
    "a tuple": (Tupled, r"it returns a tuple of 2 of 4 images and 20 classes; allowed: float32 \[4, 20\]"),
    "too many outputs": (lambda: Net(outputs=21), r"it returns float32 \[4, 21\] of 4 images and 20 classes"),
    "no gradient": (
        fresh(lambda s, x: x.detach()),
        r"(the parameter middle\.0\.weight gets no gradient|no gradient reaches)",
    ),
    "an error": (fresh(lambda s, x: x[:, 99]), r"a pass over 4 samples fails in middle\.1 \(Layer\): IndexError"),
    "other builds": (lambda: scaled(Net()), r"built twice, it begins from another head\.weight"),
}
NOTES = ("no gradient",)


def scaled(net: Net) -> Net:
    with torch.no_grad():
        net.head.weight.mul_(1 + np.random.rand())
    return net


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_cannot_keep_is_refused_by_name(tried: Tried, name: str) -> None:
    make, message = REFUSED[name]
    found = tried(make)
    lines = list(map(str, found.warnings if name in NOTES else found.refused))
    assert [line for line in lines if says(message, line)], lines
    assert all("; allowed: " in line for line in lines)


def says(pattern: str, line: str) -> bool:
    return re.search(rf"^(model|workload): .*{pattern}", line) is not None


@pytest.mark.parametrize("name", ["functional dropout", "a cache", "the batch's size", "a batch norm over workers"])
def test_ddp_warns_of_what_only_exact_refuses(tried: Tried, name: str) -> None:
    make, message = REFUSED[name]
    found = tried(make, reduction="ddp")
    assert found.refused == []
    assert any(says(message, str(breach)) for breach in found.warnings)


@pytest.mark.parametrize("name", ["a counting buffer", "float64", "a lambda", "a tuple", "changed weights"])
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


def test_a_mean_for_a_loss_is_the_workloads(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ImageClassification.loss

    def mean(self: ImageClassification, model: nn.Module, batch: Any, state: Any) -> Any:
        total, after = loss(self, model, batch, state)
        return total / batch.count, after

    monkeypatch.setattr(ImageClassification, "loss", mean)
    (found,) = tried(Net).refused
    assert found.part == "workload"
    assert "not the sum of the samples' losses" in str(found)


def test_a_loss_that_counts_its_batch_is_the_workloads(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ImageClassification.loss

    def counting(self: ImageClassification, model: nn.Module, batch: Any, state: Any) -> Any:
        total, after = loss(self, model, batch, state)
        return total + batch.count**2, after  # no gradient sees it

    monkeypatch.setattr(ImageClassification, "loss", counting)
    (found,) = tried(Net).refused
    assert str(found).startswith("workload: its loss of a batch is not the sum of the samples' losses")


def test_a_draw_is_named_once_and_is_no_state(tried: Tried) -> None:
    (found,) = tried(fresh(lambda s, x: x + torch.rand(8) if s.training else x)).refused
    assert "draws from PyTorch's global generator" in str(found)


def test_metrics_that_are_promised_and_not_there_are_the_workloads(
    tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageClassification, "metrics", lambda self, predictions: {"val_loss": 1.0, "acc1": 2.0})
    (found,) = tried(Net).refused
    assert str(found).startswith("workload: its metrics lack acc5; they are val_loss, acc1; allowed: ")


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
    assert "passes change the attribute middle.calls (0 -> 5)" in text


@pytest.mark.parametrize("make", [Net, fresh(functional), fresh(lambda s, x: x * random.random() * np.random.rand())])
def test_nothing_is_left_changed(tried: Tried, make: Make) -> None:
    device = torch.device("cpu")
    before = GlobalStates.now(device)
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    tried(make)
    assert GlobalStates.now(device).moved(before) == []
    assert (torch.get_num_threads(), torch.get_deterministic_debug_mode()) == (threads, mode)


def test_an_activation_in_a_batch_norm_is_part_of_every_pass(tried: Tried) -> None:
    """Where several shards are in a pass, a subclass still computes what it computes for one."""
    from rayexp.engine.batch_norm import per_shard
    from rayexp.engine.rng import Draws

    torch.manual_seed(0)
    x = torch.randn(8, 4, 2, 2)
    for kind in (Activated, nn.BatchNorm2d):
        one, other, draws = kind(4), kind(4), Draws()
        for norm in (one, other):
            norm.momentum, norm.num_batches_tracked = 1.0, None
        other.running_mean.zero_()
        other.running_var.zero_()
        per_shard(other, draws)
        draws.begin([], (4, 4))
        alone = [one(part) for part in x.split(4)]
        torch.testing.assert_close(other(x), torch.cat(alone))
        statistics = []
        for part in x.split(4):
            one(part)
            statistics.append(one.running_mean.clone())
        torch.testing.assert_close(other.running_mean, sum(statistics))
    for reduction in ("exact", "ddp"):
        assert tried(lambda: Net(norm=Activated(8)), reduction=reduction).breaches == ()


def test_shipped_is_known_by_name_and_package() -> None:
    config = parse({**TREE, "model": {"name": "squeezenet1_1"}}, ExperimentConfig, "test")
    workload = open_workload(config)
    assert is_shipped(config, workload, workload.model())
    assert not is_shipped(config, workload, Net())
    named = SimpleNamespace(model=SimpleNamespace(name="mine.py:make"))
    assert not is_shipped(named, workload, workload.model())  # type: ignore[arg-type]
    assert not is_shipped(config, SimpleNamespace(), workload.model())  # type: ignore[arg-type]
