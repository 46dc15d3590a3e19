"""A convolution's weight gradient tap by tap: the convolution's, and each shard's by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rayexp.engine.cpu import taps
from rayexp.engine.cpu.shardwise import keep_gradients_apart
from rayexp.engine.reduction import total
from rayexp.engine.rng import Draws, seeded

SIZES = [5, 4, 3]


def layer(stride: tuple[int, int] = (1, 1), high: int = 4, wide: int = 4) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """A convolution, its input, and a gradient of its output."""
    torch.manual_seed(high)
    conv = nn.Conv2d(128, 256, 3, stride, padding=1, bias=False)
    x = torch.randn(sum(SIZES), 128, high, wide).to(memory_format=torch.channels_last)
    return conv, x, torch.randn_like(conv(x))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize(("high", "wide"), [(4, 4), (1, 1), (2, 4), (3, 8), (7, 2)])
def test_it_is_the_gradient(stride: tuple[int, int], high: int, wide: int) -> None:
    conv, x, grad = layer(stride, high, wide)
    conv(x).backward(grad)
    found = taps.weight_gradient(nn.Parameter(conv.weight.detach()), grad, x, stride, SIZES)
    assert found is not None
    assert torch.allclose(found, conv.weight.grad, atol=1e-4)


def test_shards_are_added_in_tree_order() -> None:
    conv, x, grad = layer()
    parts = zip(grad.split(SIZES), x.split(SIZES), strict=True)
    apart = total(taps.weight_gradient(conv.weight, g, p, (1, 1), (len(p),)) for g, p in parts)  # type: ignore[misc]
    assert torch.equal(taps.weight_gradient(conv.weight, grad, x, (1, 1), SIZES), apart)


def test_it_goes_where_it_belongs() -> None:
    conv, x, grad = layer()
    alone = taps.weight_gradient(conv.weight, grad, x, (1, 1), SIZES)
    conv.weight.into = torch.full_like(conv.weight, 7.0)
    for times in (1, 2):
        assert taps.weight_gradient(conv.weight, grad, x, (1, 1), SIZES) is None
        assert conv.weight.grad is conv.weight.into
        assert torch.equal(conv.weight.into, times * alone)


@pytest.mark.parametrize(
    ("conv", "size", "pays"),
    [
        (nn.Conv2d(128, 256, 3, padding=1, bias=False), 4, True),
        (nn.Conv2d(128, 256, 3, 2, padding=1, bias=False), 8, True),
        (nn.Conv2d(128, 256, 3, padding=1, bias=False), 5, False),
        (nn.Conv2d(128, 128, 3, padding=1, bias=False), 4, False),
        (nn.Conv2d(128, 256, 3, padding=1), 4, False),
        (nn.Conv2d(128, 256, 1, bias=False), 4, False),
        (nn.Conv2d(128, 256, 3, padding=0, bias=False), 4, False),
        (nn.Conv2d(256, 256, 3, padding=1, groups=2, bias=False), 4, False),
        (nn.Conv2d(128, 256, 3, padding=2, dilation=2, bias=False), 4, False),
    ],
)
def test_where_it_pays(monkeypatch: pytest.MonkeyPatch, conv: nn.Conv2d, size: int, pays: bool) -> None:
    taken: list[int] = []
    true = taps.weight_gradient
    monkeypatch.setattr(taps, "weight_gradient", lambda *args: taken.append(1) or true(*args))
    x = torch.randn(6, conv.in_channels, size, size, requires_grad=True)
    conv(x).square().sum().backward()
    assert x.grad is not None
    expected = [p.grad.clone() for p in conv.parameters() if p.grad is not None], x.grad.clone()
    conv.zero_grad()
    x.grad = None
    apart, draws = nn.Sequential(conv), Draws()
    keep_gradients_apart(apart, draws)
    draws.begin(seeded([0, 1], x.device), [4, 2])
    apart(x).square().sum().backward()
    assert bool(taken) == pays
    for found, wanted in zip([*[p.grad for p in conv.parameters()], x.grad], [*expected[0], expected[1]], strict=True):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_through_a_layer_too_it_is_written_into_the_buffer() -> None:
    """Nothing is left for autograd where a pass uses the weight once; after two uses autograd adds up the gradients."""
    conv, x, _ = layer()
    apart, draws = nn.Sequential(conv, nn.Conv2d(256, 128, 1, bias=False), conv), Draws()
    keep_gradients_apart(apart, draws)
    draws.begin(seeded([0, 1, 2], x.device), SIZES)
    for uses, model in enumerate((apart[:1], apart), 1):
        conv.weight.uses, conv.weight.grad, conv.weight.into = 0, None, torch.empty_like(conv.weight)
        model(x).square().sum().backward()
        assert conv.weight.uses == uses
        assert (conv.weight.grad is conv.weight.into) == (uses == 1)
