"""Batch norm over each shard of a pass: the two ways of computing it are one mathematics."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import runtime
from rayexp.engine.batch_norm import folded, per_shard
from rayexp.engine.checkpoint import sha, snapshot
from rayexp.engine.group import WorkerGroup
from rayexp.engine.rng import Draws
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.workloads.samples import Samples, SampleWorkload


def norm_of(kind: type[nn.Module], affine: bool) -> Any:
    """A batch norm of three channels as a replica has it: with momentum 1, and statistics to which a pass adds."""
    norm: Any = kind(3, eps=1e-3, momentum=1.0, affine=affine)  # type: ignore[call-arg]
    with torch.no_grad():
        for parameter, values in zip(norm.parameters(), ([0.5, -2.0, 3.0], [1.0, 0.0, -4.0]), strict=False):
            parameter.copy_(torch.tensor(values))
    return norm.double()


def gradients(out: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss in which every element of the output counts otherwise."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), of)


@pytest.mark.parametrize(
    ("kind", "shape", "last"),
    [
        (nn.BatchNorm2d, (12, 3, 4, 5), True),
        (nn.BatchNorm2d, (12, 3, 4, 5), False),
        (nn.BatchNorm1d, (12, 3), False),
        (nn.BatchNorm1d, (12, 3, 7), False),
        (nn.BatchNorm3d, (12, 3, 2, 3, 4), False),
    ],
)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("way", ["folded", "formula"])
def test_shards_in_one_call_are_shards_by_themselves(
    kind: type[nn.Module], shape: tuple[int, ...], last: bool, affine: bool, shards: int, way: str
) -> None:
    """With `folded` a GPU computes, and the formula is what a compiler is given; here against one shard after another
    as PyTorch has it."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x *= torch.arange(1, 13).view(-1, *[1] * (len(shape) - 1))  # no two shards have one variance
    if last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    norm = norm_of(kind, affine)
    norm.running_mean.fill_(0.25)
    norm.running_var.fill_(0.5)
    if way == "folded":
        out = folded(norm, shards, x)
    else:
        draws = Draws()
        per_shard(model := nn.Sequential(norm), draws, compiled=True)
        draws.begin([], [len(x) // shards] * shards)
        out = model(x)
    apart = [norm_of(kind, affine) for _ in range(shards)]
    expected = torch.cat([one(part) for one, part in zip(apart, x.chunk(shards), strict=True)])
    accuracy = 1e-9 if way == "folded" else 1e-4  # the formula is float32 throughout
    close = functools.partial(torch.testing.assert_close, rtol=accuracy, atol=accuracy, check_dtype=way == "folded")
    close(out, expected)
    close(norm.running_mean, sum(one.running_mean for one in apart) + 0.25)
    close(norm.running_var, sum(one.running_var for one in apart) + 0.5)
    of_x, *of_norm = gradients(out, [x, *norm.parameters()])
    of_x_apart, *of_each = gradients(expected, [x, *(p for one in apart for p in one.parameters())])
    close(of_x, of_x_apart)
    count = len(of_norm)
    for i, found in enumerate(of_norm):
        close(found, sum(of_each[i::count]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_stays_and_statistics_are_float32(dtype: torch.dtype) -> None:
    """As activations come under autocast: in channels_last, maybe bfloat16, with float32 weights."""
    norm = nn.BatchNorm2d(3, momentum=1.0)
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    out = folded(norm, 4, x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert norm.running_mean.dtype == torch.float32
    plain, draws = copy.deepcopy(norm), Draws()
    plain.reset_running_stats()
    model = nn.Sequential(plain)
    per_shard(model, draws)
    draws.begin([], [2] * 4)
    torch.testing.assert_close(out, model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("way", ["by shard", "formula", "subclass"])
def test_samples_may_be_folded_with_patches(way: str) -> None:
    """Three rows a sample, the sample outermost: a shard of two samples has six."""

    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    norm = norm_of(Own if way == "subclass" else nn.BatchNorm1d, True)
    plain, draws = copy.deepcopy(norm), Draws()
    x = (
        torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        * torch.arange(1, 13)[:, None]
    )
    per_shard(model := nn.Sequential(norm), draws, compiled=way == "formula")
    draws.begin([], [2, 2])
    torch.testing.assert_close(model(x), torch.cat([plain(part) for part in x.split(6)]), rtol=1e-4, atol=1e-6)
    draws.begin([], [5])
    with pytest.raises(RuntimeError, match="on another batch than announced"):
        model(x)


class Activated(nn.BatchNorm2d):
    """A batch norm with what follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x)) * 3


def test_an_activation_in_a_batch_norm_is_part_of_every_pass() -> None:
    """Where several shards are in a pass, a subclass still computes what it computes for one."""
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


# ---------------------------------------------------------------------- an average over steps (momentum None)


class Averaging(SampleWorkload):
    """Its first layer is a batch norm without momentum, whose statistics are those of the data."""

    def __init__(self, config: ExperimentConfig) -> None:
        generator = torch.Generator().manual_seed(3)
        x = (torch.randn(24, 3, generator=generator) * torch.tensor([1.0, 5.0, 0.1])).numpy()
        super().__init__(config, Samples((x,), x[:, 0]), Samples((x[:4],), x[:4, 0]))

    def build(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 1))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs[:, 0], targets, reduction="none")


@pytest.fixture
def averaging() -> Iterator[Callable[[str], Trainer]]:
    with contextlib.ExitStack() as stack:

        def make(reduction: str) -> Trainer:
            tree = {"batch_size": 8, "shards": 2, "epochs": 2, "lr": 0.01, "reduction": reduction}
            config = parse(tree, ExperimentConfig, "test")
            here = stack.enter_context(runtime.configure(config, torch.device("cpu"), config.shards, 1))
            return Trainer(config, Averaging(config), WorkerGroup(), here)

        yield make


@pytest.mark.parametrize("reduction", ["exact", "ddp"])
def test_without_momentum_all_batches_count_alike_as_pytorch_has_it(
    averaging: Callable[[str], Trainer], reduction: str
) -> None:
    trainer = averaging(reduction)
    workload, plain = trainer.workload, nn.BatchNorm1d(3, momentum=None)
    for event in trainer.train():
        if isinstance(event, StepDone):
            for shard in range(2):
                batch = workload.batch(event.epoch, event.step - 1, range(shard, shard + 1), torch.device("cpu"))
                plain(*batch.inputs)
            norm: Any = trainer.eval_models[0][0]  # type: ignore[index]
            torch.testing.assert_close(norm.running_mean, plain.running_mean)
            torch.testing.assert_close(norm.running_var, plain.running_var)
    assert trainer.global_step == 6


def test_an_average_goes_on_after_a_resume(averaging: Callable[[str], Trainer]) -> None:
    through, resumed = averaging("exact"), averaging("exact")
    for event in through.train():
        if isinstance(event, StepDone) and (event.epoch, event.step) == (1, 2):
            resumed.load(snapshot(through.state(), {}))
    for _ in resumed.train():
        pass
    assert sha(resumed.state().tensors) == sha(through.state().tensors)
