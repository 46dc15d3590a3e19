"""The blocked cross-entropy and the row-wise embedding against PyTorch's own."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayexp.engine.cpu import blocked_loss
from rayexp.engine.cpu.blocked_loss import blocked_cross_entropy, blocked_embedding


def problem(tokens: int, size: int, words: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, dtype=dtype, generator=g) * scale
    weight = torch.randn(words, size, dtype=dtype, generator=g)
    bias = torch.randn(words, dtype=dtype, generator=g)
    targets = torch.randint(words, (tokens,), generator=g)
    return [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets]


def close(found: Tensor, wanted: Tensor, relative: float) -> None:
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    assert error < relative


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    size=st.integers(1, 7),
    words=st.integers(1, 70),
    block=st.integers(1, 80),
    keep=st.sampled_from([0, 300, 1 << 20]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_cross_entropy_in_float64(
    tokens: int, size: int, words: int, block: int, keep: int, with_bias: bool, seed: int
) -> None:
    hidden, weight, bias, targets = problem(tokens, size, words, torch.float64, seed, scale=3)
    own = bias if with_bias else None
    outer = torch.rand(tokens, dtype=torch.float64)  # not all ones: the chain rule has to be there
    wanted = F.cross_entropy(F.linear(hidden, weight, own), targets, reduction="none")
    losses = blocked_cross_entropy(hidden, weight, own, targets, block, keep)
    torch.testing.assert_close(losses, wanted, rtol=1e-10, atol=1e-12)
    inputs = [hidden, weight] + ([bias] if with_bias else [])
    for found, true in zip(
        torch.autograd.grad(losses, inputs, outer), torch.autograd.grad(wanted, inputs, outer), strict=True
    ):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-11)


def test_gradcheck() -> None:
    hidden, weight, bias, targets = problem(4, 3, 11, torch.float64)
    for keep in (0, 1 << 20):
        assert torch.autograd.gradcheck(
            lambda h, w, b, k=keep: blocked_cross_entropy(h, w, b, targets, 4, k), (hidden, weight, bias)
        )


@pytest.mark.parametrize("words", [100, 2048, 5000])
def test_float32_is_within_1e6_of_float64(words: int) -> None:
    hidden, weight, bias, targets = problem(50, 24, words, torch.float32, scale=0.3)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    wanted = F.cross_entropy(F.linear(*wide), targets, reduction="none")
    wanted.sum().backward()
    losses = blocked_cross_entropy(hidden, weight, bias, targets)
    losses.sum().backward()
    close(losses, wanted, 1e-6)
    for mine, true in zip((hidden, weight, bias), wide, strict=True):
        close(mine.grad, true.grad, 1e-6)


def test_large_logits_neither_overflow_nor_vanish() -> None:
    hidden, weight, bias, targets = problem(8, 16, 300, torch.float32, scale=1e4)
    wanted = F.cross_entropy(
        F.linear(*(t.detach().double() for t in (hidden, weight, bias))), targets, reduction="none"
    )
    losses = blocked_cross_entropy(hidden, weight, bias, targets, 64)
    close(losses, wanted, 1e-6)
    losses.sum().backward()
    assert all(t.grad.isfinite().all() for t in (hidden, weight, bias))


def test_what_is_kept_changes_no_bit() -> None:
    found = []
    for keep in (0, 40_000, 1 << 30):
        hidden, weight, bias, targets = problem(20, 8, 3000, torch.float32)
        blocked_cross_entropy(hidden, weight, bias, targets, 500, keep).sum().backward()
        found.append((hidden.grad, weight.grad, bias.grad))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_second_backward_gives_the_same_bits() -> None:
    hidden, weight, bias, targets = problem(20, 8, 3000, torch.float32)
    loss = blocked_cross_entropy(hidden, weight, bias, targets, 500).sum()
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (hidden, weight, bias))))


def test_the_gradient_is_added_into_the_tensor_that_is_there() -> None:
    plain = problem(20, 8, 3000, torch.float32)
    blocked_cross_entropy(*plain).sum().backward()
    mine = problem(20, 8, 3000, torch.float32)
    views = [torch.ones_like(t) for t in mine[1:3]]
    mine[1].grad, mine[2].grad = views
    blocked_cross_entropy(*mine).sum().backward()
    assert mine[1].grad is views[0]
    assert mine[2].grad is views[1]
    close(views[0] - 1, plain[1].grad, 1e-5)
    close(views[1] - 1, plain[2].grad, 1e-5)
    assert torch.equal(mine[0].grad, plain[0].grad)


def test_passes_that_share_a_row_leave_the_sum_of_two_to_the_bit() -> None:
    """The first writes over what is there, the second adds its gradient as a whole."""
    alone = []
    for seed in (0, 1):
        hidden, weight, bias, targets = problem(40, 8, 3000, torch.float32, seed)
        fixed = problem(40, 8, 3000, torch.float32)
        weight, bias = fixed[1], fixed[2]
        blocked_cross_entropy(hidden, weight, bias, targets, 500).sum().backward()
        alone.append((weight.grad, bias.grad))
    _, weight, bias, _ = problem(40, 8, 3000, torch.float32)
    weight.into, bias.into = torch.full_like(weight, 7.0), torch.full_like(bias, 7.0)
    for seed in (0, 1):
        hidden, _, _, targets = problem(40, 8, 3000, torch.float32, seed)
        blocked_cross_entropy(hidden, weight, bias, targets, 500).sum().backward()
        for leaf in (weight, bias):
            assert leaf.grad is leaf.into
        if seed == 0:
            assert torch.equal(weight.grad, alone[0][0])
            assert torch.equal(bias.grad, alone[0][1])
    for leaf, first, second in zip((weight, bias), *alone, strict=True):
        assert torch.equal(leaf.grad, first + second)


def test_frozen_parameters_get_no_gradient() -> None:
    hidden, weight, bias, targets = problem(5, 4, 30, torch.float32)
    weight.requires_grad_(False).grad = torch.zeros_like(weight)
    blocked_cross_entropy(hidden, weight, bias, targets, 8).sum().backward()
    assert not weight.grad.any()
    assert bias.grad.any()
    assert hidden.grad.any()


def test_the_logits_are_never_whole() -> None:
    """No tensor that is made comes near the matrix [tokens, words], nor does all that is kept for the backward pass."""
    hidden, weight, bias, targets = problem(256, 16, 40_000, torch.float32)
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    whole = 256 * 40_000 * 4
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
        blocked_cross_entropy(hidden, weight, bias, targets).sum().backward()
    assert largest < whole / 8
    assert whole > blocked_loss.KEEP


def test_bf16_products_keep_a_float32_loss() -> None:
    hidden, weight, bias, targets = problem(40, 32, 3000, torch.float32, scale=0.2)
    wanted = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    true = torch.autograd.grad(wanted.sum(), (hidden, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        losses = blocked_cross_entropy(hidden, weight, bias, targets, 1000)
    assert losses.dtype == torch.float32
    close(losses, wanted, 1e-2)
    losses.sum().backward()
    for mine, exact in zip((hidden, weight, bias), true, strict=True):
        assert mine.grad.dtype == torch.float32
        close(mine.grad, exact, 2e-2)


def test_threads_side_by_side_give_the_same_bits() -> None:
    def once() -> tuple[Tensor, ...]:
        hidden, weight, bias, targets = problem(30, 16, 5000, torch.float32)
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        blocked_cross_entropy(hidden, weight, bias, targets, 700).sum().backward()
        return hidden.grad, weight.grad, bias.grad

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted, found = once(), []

        def replica() -> None:
            torch.set_num_threads(1)
            found.extend(once() for _ in range(5))

        threads = [threading.Thread(target=replica) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert len(found) == 15
    assert all(all(map(torch.equal, wanted, other)) for other in found)


# ---------------------------------------------------------------------- the embedding


def test_the_embedding_equals_pytorchs() -> None:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(7, (5, 3), generator=g)  # words come more than once
    outer = torch.randn(5, 3, 4, generator=g, dtype=torch.float64)
    weight = torch.randn(7, 4, generator=g, dtype=torch.float64, requires_grad=True)
    wanted = F.embedding(tokens, weight)
    (true,) = torch.autograd.grad(wanted, weight, outer)
    found = blocked_embedding(tokens, weight)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, weight, outer)[0], true)
    weight.grad = held = torch.ones_like(weight)
    blocked_embedding(tokens, weight).backward(outer)
    assert weight.grad is held
    torch.testing.assert_close(held - 1, true)


@settings(max_examples=25, deadline=None)
@given(words=st.integers(1, 9), tokens=st.integers(1, 30), seed=st.integers(0, 99), zeroed=st.booleans())
def test_embeddings_that_share_a_row_leave_the_sum_of_two_to_the_bit(
    words: int, tokens: int, seed: int, zeroed: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    passes = [(torch.randint(words, (tokens,), generator=g), torch.randn(tokens, 3, generator=g)) for _ in range(2)]
    weight = torch.zeros(words, 3, requires_grad=True)
    alone = [torch.autograd.grad(blocked_embedding(read, weight), weight, outer)[0] for read, outer in passes]
    weight.into = torch.full_like(weight, 0.0 if zeroed else 7.0)
    weight.grad = weight.into if zeroed else None
    for read, outer in passes:
        blocked_embedding(read, weight).backward(outer)
        assert weight.grad is weight.into
    assert torch.equal(weight.grad, alone[0] + alone[1])


def test_tied_weights_collect_both_gradients() -> None:
    g = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(50, (2, 12), generator=g)
    true = torch.randn(50, 6, generator=g, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(F.embedding(tokens, true) @ true.t(), targets, reduction="sum").backward()
    for held in (None, torch.zeros_like(true)):
        weight = true.detach().clone().requires_grad_()
        weight.grad = held
        blocked_cross_entropy(blocked_embedding(tokens, weight), weight, None, targets, 16).sum().backward()
        torch.testing.assert_close(weight.grad, true.grad)
