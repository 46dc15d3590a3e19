"""Convolutions onto small maps as matrix products against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayexp.engine.cpu.small_map import use_small_map_convolutions
from rayexp.engine.rng import Draws, seeded


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (4, 2)])
@pytest.mark.parametrize(("n", "cin", "cout"), [(1, 8, 8), (5, 16, 24), (32, 64, 64)])
def test_a_small_map_convolution_is_the_convolution(n: int, cin: int, cout: int, size: int, stride: int) -> None:
    torch.manual_seed(n)
    plain = nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False)
    small = nn.Sequential(nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False))
    small[0].weight.data.copy_(plain.weight)
    (by_products,) = use_small_map_convolutions(small)
    x = torch.randn(n, cin, size, size, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    grad = torch.randn_like(plain(x))
    plain(x).backward(grad)
    out = small(x2)
    out.backward(grad)
    assert type(out.grad_fn).__name__ == "_SmallMapBackward"
    assert torch.allclose(out, plain(x), atol=1e-4)
    assert x.grad is not None
    assert x2.grad is not None
    assert torch.allclose(x2.grad, x.grad, atol=1e-4)
    assert torch.allclose(small[0].weight.grad, plain.weight.grad, atol=1e-4)
    by_products.begin_step()
    assert torch.equal(small(x2), out)
    assert list(by_products.kept) == [size]
    by_products.end_step()
    for changed in (small[0].weight.data, small[0].weight.data.view(-1)):  # no version of the weight tells of these
        with torch.no_grad():
            changed.mul_(2)
        by_now = torch.nn.functional.conv2d(x2, small[0].weight, stride=stride, padding=1)
        assert torch.allclose(small(x2), by_now, atol=1e-3)
    assert not by_products.kept


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, bias=False, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, padding=1, bias=False, groups=2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(8, 8, 3, stride=3, padding=1, bias=False),
        nn.Conv2d(8, 8, 1, bias=False),
    ],
)
def test_other_convolutions_stay_as_they_are(conv: nn.Conv2d) -> None:
    x = torch.randn(2, 8, 2, 2)
    wanted = conv(x)
    assert use_small_map_convolutions(nn.Sequential(conv)) == []
    assert torch.equal(conv(x), wanted)


@pytest.mark.parametrize("otherwise", ["large", "without gradient"])
def test_elsewhere_the_convolution_is_pytorchs(otherwise: str) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    large = otherwise == "large"
    x = torch.randn(2, 8, *((6, 6) if large else (2, 2)))
    with torch.set_grad_enabled(large):
        wanted = conv(x)
        use_small_map_convolutions(nn.Sequential(conv))
        assert torch.equal(conv(x), wanted)


def test_hooks_of_a_convolution_still_run() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    seen: list[torch.Size] = []
    conv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    use_small_map_convolutions(nn.Sequential(conv))
    conv(torch.randn(2, 8, 2, 2))
    assert seen == [(2, 8, 2, 2)]


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1), (5, 5), (1, 1)])
def test_a_weight_of_two_maps_in_one_pass(sizes: tuple[int, int]) -> None:
    """Both gradients are added up by autograd before they come to the buffer, which may hold another shard's."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    xs = [torch.randn(3, 8, size, size) for size in sizes]
    sum(conv(x).square().sum() for x in xs).backward()
    assert conv.weight.grad is not None
    wanted, before = conv.weight.grad.clone(), torch.randn_like(conv.weight)
    use_small_map_convolutions(nn.Sequential(conv))
    conv.weight.uses = 0
    conv.weight.into = conv.weight.grad = before.clone()
    seen = []
    accumulator = torch.autograd.graph.get_gradient_edge(conv.weight).node
    accumulator.register_prehook(lambda gradients: seen.extend(gradients))
    sum(conv(x).square().sum() for x in xs).backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv.weight.grad, before + wanted, rtol=1e-4, atol=1e-4)


def test_shards_keep_their_gradients_apart() -> None:
    """The gradient of two shards in a pass has the bits of the sum of theirs."""
    torch.manual_seed(0)
    conv, draws = nn.Conv2d(8, 8, 3, padding=1, bias=False), Draws()
    x = torch.randn(5, 8, 2, 2)
    use_small_map_convolutions(nn.Sequential(conv), draws)
    found = []
    for parts in ([x], x.split([3, 2])):
        gradients = []
        for part in parts:
            conv.weight.grad = None
            draws.begin(
                seeded((0, 1) if len(parts) == 1 else (0,), x.device), (3, 2) if len(parts) == 1 else (len(part),)
            )
            conv(part).square().sum().backward()
            assert conv.weight.grad is not None
            gradients.append(conv.weight.grad)
        found.append(sum(gradients[1:], gradients[0]))
    assert torch.equal(*found)
