"""Copies the gradients of a backward pass into a flat buffer, with few kernels: a GPU takes as long for the 64 elements
of a batch norm's bias as for a thousand times as many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SMALL = 4096
"""Elements of a vector whose gradient is not worth a kernel of its own."""


class GradientCopy:
    """Copies gradients; small vectors that lie next to each other go together.

    Attributes:
        runs: all parameters by index: those that are copied together.

    Args:
        shapes: of each parameter.
        spans: where its elements lie in the buffer, in ascending order.
        device: where the buffer lies.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], spans: Sequence[range], device: torch.device) -> None:
        # Only a vector's elements lie in the buffer in the order that `reshape` gives them.
        small = [len(shape) < 2 and len(span) <= SMALL for shape, span in zip(shapes, spans, strict=True)]
        firsts = [i for i in range(len(small)) if i == 0 or not (small[i - 1] and small[i])]
        self.runs = [range(*each) for each in itertools.pairwise([*firsts, len(small)])]
        self._spans = spans
        gaps = [after.start - span.stop for span, after in itertools.pairwise(spans)]
        self._zeros = torch.zeros(max(SMALL, *gaps, 0), device=device)

    def __call__(self, found: Sequence[Tensor | None], views: Sequence[Tensor], flat: Tensor) -> None:
        """Overwrite what the buffer holds.

        Args:
            found: a gradient for each parameter; None is zero.
            views: the buffer's views of their shapes.
            flat: fp32[P], the buffer itself.
        """
        for run in self.runs:
            if len(run) > 1:
                where = slice(self._spans[run.start].start, self._spans[run.stop - 1].stop)
                torch.cat([part for i in run for part in self._parts(found[i], i, run)], out=flat[where])
            elif (value := found[run.start]) is None:
                views[run.start].zero_()
            else:
                views[run.start].copy_(value)

    def _parts(self, value: Tensor | None, index: int, run: range) -> Iterator[Tensor]:
        """A vector, and the zeros between it and the next one of its run. All are float32: of tensors of several types
        each would get a kernel."""
        span = self._spans[index]
        yield self._zeros[: len(span)] if value is None else value.reshape(-1).float()
        if index + 1 in run and (gap := self._spans[index + 1].start - span.stop):
            yield self._zeros[:gap]
