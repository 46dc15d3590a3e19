"""Gradients into a flat buffer: what autograd's own accumulation leaves there, with one operation for small vectors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rayexp.engine import gradient_copy
from rayexp.engine.gradient_copy import GradientCopy

CPU = torch.device("cpu")
UNIT = 16
# A convolution, its norm, a convolution without one, and vectors: two small ones, one too large, one more.
SHAPES = [(4, 3, 3, 3), (4,), (4,), (5, 4, 1, 1), (7,), (UNIT,), (40,), (3,)]


class Counting(TorchDispatchMode):
    """Counts what is written by one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.written += func._schema.is_mutable
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_copy, "SMALL", 32)


def laid_out(shapes: list[tuple[int, ...]]) -> list[range]:
    """Each starts at a multiple of UNIT, as in a ParameterLayout."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    starts = itertools.accumulate((-(-size // UNIT) * UNIT for size in sizes), initial=0)
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=False)]


def copied(found: list[Tensor | None], shapes: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, int]:
    """The buffer, what it must be, and how many operations wrote it."""
    spans = laid_out(shapes)
    copy = GradientCopy(shapes, spans, CPU)
    size = spans[-1].stop + UNIT
    flat, expected = torch.zeros(size), torch.zeros(size)
    for span in spans:  # of an earlier pass
        flat[span.start : span.stop] = 7.0
    strides = [
        torch.empty(shape).to(memory_format=torch.channels_last).stride() if len(shape) == 4 else (1,)
        for shape in shapes
    ]

    def views(buffer: Tensor) -> list[Tensor]:
        return [torch.as_strided(buffer, *each, s.start) for *each, s in zip(shapes, strides, spans, strict=True)]

    for view, value in zip(views(expected), found, strict=True):
        view.copy_(torch.zeros(()) if value is None else value)
    with Counting() as counting:
        copy(found, views(flat), flat)
    return flat, expected, counting.written


def values(dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gradient_lies_in_its_place_and_what_is_between_stays_zero(dtype: torch.dtype) -> None:
    flat, expected, _ = copied(values(dtype), SHAPES)
    assert torch.equal(flat, expected)


@pytest.mark.parametrize("absent", [(0,), (1,), (2,), (1, 2), (6,), tuple(range(len(SHAPES)))])
def test_a_parameter_that_was_not_used_has_zeros(absent: tuple[int, ...]) -> None:
    found = [None if i in absent else value for i, value in enumerate(values())]
    flat, expected, _ = copied(found, SHAPES)
    assert torch.equal(flat, expected)


def test_vectors_next_to_each_other_take_one_operation() -> None:
    """A norm's weight and bias; then two, and what is too large apart."""
    assert GradientCopy(SHAPES, laid_out(SHAPES), CPU).runs == [
        *(range(0, 1), range(1, 3), range(3, 4), range(4, 6), range(6, 7), range(7, 8)),
    ]
    assert copied(values(), SHAPES)[2] == 6


def test_strided_and_single_gradients() -> None:
    """As backward passes give them: expanded, or transposed."""
    shapes: list[tuple[int, ...]] = [(4,), (4,), (3, 2)]
    found: list[Tensor | None] = [torch.ones(()).expand(4), torch.arange(8.0)[::2], torch.arange(6.0).view(2, 3).t()]
    spans = laid_out(shapes)
    flat = torch.full((spans[-1].stop,), 7.0)
    views = [flat[s.start : s.stop].view(shape) for s, shape in zip(spans, shapes, strict=True)]
    GradientCopy(shapes, spans, CPU)(found, views, flat)
    assert all(torch.equal(view, value) for view, value in zip(views, found, strict=True))
