"""Adaptive average pooling in one order: PyTorch's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rayexp.engine.average_pooling import add_in_order, average

POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
sizes = st.integers(1, 9)


def found(pool: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = pool(leaf)
    weights = torch.linspace(-1, 1, y.numel(), dtype=x.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaf)]


@settings(max_examples=40)
@given(st.lists(st.tuples(sizes, st.none() | sizes), min_size=1, max_size=3))
def test_it_has_the_numbers_of_the_ordinary_one(dims: list[tuple[int, Any]]) -> None:
    """Divisible or not, larger or smaller, in one to three dimensions."""
    before, after = zip(*dims, strict=True)
    pool = POOL[len(dims)](after if len(dims) > 1 else after[0] or before[0])
    x = torch.randn(2, 3, *before, dtype=torch.float64)
    expected = found(pool, x)
    add_in_order(pool)
    torch.testing.assert_close(found(pool, x), expected)


def test_a_type_of_few_bits_is_added_up_in_float32() -> None:
    x = torch.full((1, 1, 300, 2), 1.0, dtype=torch.bfloat16)
    x[0, 0, 0] = 300.0
    y = average(x, (1, 2))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), torch.full((1, 1, 1, 2), 599 / 300), rtol=1e-2, atol=0)


def test_what_stays_as_it_is_is_another_tensor() -> None:
    """A model may change what a pool returns in its place."""
    x = torch.ones(1, 2, 3, 3)
    average(x, (3, None)).zero_()
    assert torch.equal(x, torch.ones(1, 2, 3, 3))


@pytest.mark.parametrize("size", [1, (1, 1)])
def test_a_pool_to_one_pixel_and_a_pool_with_a_forward_of_its_own_stay(size: Any) -> None:
    class Own(nn.AdaptiveAvgPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(nn.AdaptiveAvgPool2d(size), Own(3))
    add_in_order(model)
    assert not any("forward" in vars(module) for module in model)
