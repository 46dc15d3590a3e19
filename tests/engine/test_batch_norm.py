"""Batch norm over each shard of a pass: the two ways of computing it are one mathematics."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayexp.engine.batch_norm import folded, per_shard
from rayexp.engine.rng import Draws


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
