"""The rules of a CUDA graph, kept by the one that stands for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Kind = Callable[..., Any]


def test_recording_changes_nothing_and_each_replay_everything(replay: Kind) -> None:
    """In place, through views, with `out=`, into new memory."""
    x, y, calls = torch.ones(4), torch.zeros(2, 2), []
    kept: list[Tensor] = []

    def work() -> None:
        calls.append(1)
        x.mul_(2.0)
        x.view(2, 2)[1].add_(1.0)
        torch.add(x.view(2, 2).t(), 1.0, out=y)
        kept[:] = [x + y.flatten()]

    graph = replay(work, (), None)
    assert x.tolist() == [1.0] * 4
    assert not y.any()
    expected = torch.ones(4)
    for _ in range(3):
        graph()
        expected = expected * 2 + torch.tensor([0.0, 0.0, 1.0, 1.0])
        assert torch.equal(x, expected)
        assert torch.equal(y, expected.view(2, 2).t() + 1)
        assert torch.equal(kept[0], x + y.flatten())
    assert calls == [1]


def test_a_backward_pass_is_part_of_it(replay: Kind) -> None:
    net, x, found = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), torch.ones(2, 3), torch.zeros(9)

    def work() -> None:
        found.copy_(torch.autograd.grad(net(x).sum(), list(net.parameters()))[0].flatten())

    graph = replay(work, (), None)
    for factor in (1.0, 3.0):
        with torch.no_grad():
            net[2].weight.mul_(factor)
            x.mul_(factor)
        graph()
        replayed = found.clone()
        work()
        assert replayed.any()
        assert torch.equal(replayed, found)


def test_numbers_of_python_stay_what_they_were(replay: Kind) -> None:
    x, python = torch.zeros(2), [1.0]
    graph = replay(lambda: x.add_(python[0]), (), None)
    python[0] = 5.0
    graph()
    assert x.tolist() == [1.0, 1.0]


def test_generators_draw_what_they_are_seeded_for(replay: Kind) -> None:
    x, generator, other = torch.zeros(4), torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    before = generator.get_state()
    graph = replay(lambda: x.uniform_(generator=generator), [generator], None)
    assert torch.equal(generator.get_state(), before)
    for seed in (3, 4):
        generator.manual_seed(seed)
        graph()
        assert torch.equal(x, torch.empty(4).uniform_(generator=torch.Generator().manual_seed(seed)))
    with pytest.raises(RuntimeError, match="draws from a generator that is not registered"):
        replay(lambda: x.uniform_(generator=other), [generator], None)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_its_memory_holds_nothing_of_use_before_a_replay(replay: Kind, kind: torch.dtype) -> None:
    """Neither what the recording nor what the last replay has left."""
    found, made = torch.zeros(3, dtype=kind), list[Tensor]()
    graph = replay(lambda: (made.append(torch.empty(3, dtype=kind)), found.copy_(made[0])), (), None)
    for _ in range(2):
        made[0].zero_()
        graph()
        assert found.isnan().all() if kind.is_floating_point else found.long().min() > 0
        found.zero_()


def test_memory_that_nobody_refers_to_belongs_to_others(replay: Kind) -> None:
    """Another graph that reads it finds nothing of use there."""
    x, total, held = torch.ones(3), torch.zeros(3), list[Tensor]()
    first = replay(lambda: held.append(x * 2), (), None)
    second = replay(lambda: total.add_(held[0]), (), None)
    first()
    second()
    assert total.tolist() == [2.0] * 3
    view = held[0][1:]
    held.clear()
    first()
    second()  # a view is a reference, too
    assert total.tolist() == [4.0] * 3
    del view
    first()
    with pytest.raises(AssertionError, match=r"is gone \(12 bytes\)"):
        second()
    assert total.tolist() == [4.0] * 3


def test_other_memory_must_still_be_there(replay: Kind) -> None:
    x, numbers = torch.zeros(3), [torch.ones(3)]
    graph = replay(lambda: x.add_(numbers[0]), (), None)
    graph()
    numbers[0] = numbers[0] + 1
    with pytest.raises(AssertionError, match=r"is gone \(12 bytes\)"):
        graph()


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (lambda x: x.sum().item(), "asks for a value"),
        (lambda x: bool((x > 0).all()), "asks for a value"),
        (lambda x: x.nonzero(), "asks for a value"),
        (lambda x: x[x > 0], "asks how much is masked"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), "takes what the host has"),
    ],
)
def test_what_no_graph_holds_is_refused(replay: Kind, work: Callable[[Tensor], object], why: str) -> None:
    """With everything as it was."""
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match=why):
        replay(lambda: (x.mul_(2.0), work(x)), (), None)
    assert x.tolist() == [1.0] * 3
