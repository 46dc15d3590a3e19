"""3x3 convolutions onto maps of one or two pixels' height and width as matrix products (CPU).

On so small a map many taps fall on padding: 20 of 36 from a 2x2 map, 11 of 36 from a 4x4 map with stride 2. One
product for what is seen at a time, with the taps that see it, wastes nothing. The last stage of a ResNet at 64 px is a
third of its time otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rayexp.engine.draws import Draws
from rayexp.engine.matmul import product
from rayexp.engine.reduce import total

LARGEST = 2
"""Height and width of the largest output map that takes the short way."""
FEW = 128
"""Fewer rows than this are the second operand of a product."""
Taps = tuple[slice, slice]
View = tuple[slice, slice, range, list[Taps]]
"""Rows and columns of the map that are seen, the output pixels that see them, and for each of these its taps."""


def out_size(size: int, stride: int) -> int:
    """Height and width of the output from a map of `size` x `size`, with padding 1."""
    return (size - 1) // stride + 1


def views(size: int, stride: int) -> list[View]:
    """What the output pixels, in order, see of a map of `size` x `size`; neighbours that see the same share a view."""
    spans = []
    for out in range(out_size(size, stride)):
        corner = out * stride - 1
        rows = slice(max(0, corner), min(size, corner + 3))
        spans.append((rows, slice(rows.start - corner, rows.stop - corner)))
    found: list[View] = []
    for pixel, ((rows, up), (columns, along)) in enumerate(itertools.product(spans, spans)):
        if found and found[-1][:2] == (rows, columns):
            _, _, before, taps = found.pop()
            found.append((rows, columns, range(before.start, pixel + 1), [*taps, (up, along)]))
        else:
            found.append((rows, columns, range(pixel, pixel + 1), [(up, along)]))
    return found


def as_matrices(weight: Tensor, seen: Sequence[View]) -> list[Tensor]:
    """For each view fp32[pixels that see * out, pixels seen * in], from fp32[out, in, 3, 3]."""
    taps = weight.detach().permute(0, 2, 3, 1)
    # Copied even where a view would do: oneDNN is slow on rows with gaps.
    return [torch.stack([taps[:, up, along] for up, along in view[3]]).flatten(2).flatten(0, 1) for view in seen]


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix.T for fp32[n, k] and fp32[m, k]."""
    # oneDNN rearranges its second operand in every call: better few rows than a large matrix.
    return product(matrix, rows).t().contiguous() if len(rows) < FEW else product(rows, matrix)


class _SmallMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: int,
        seen: Sequence[View],
        matrices: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> Tensor:
        n, cout = len(x), len(weight)
        pixels = x.permute(0, 2, 3, 1)
        ctx.save_for_backward(pixels, *matrices)
        ctx.leaf, ctx.stride, ctx.seen, ctx.sizes = weight, stride, seen, list(sizes)
        parts = [pixels[:, rows, columns].flatten(1) for rows, columns, _, _ in seen]
        outs = [times(*pair).view(n, -1, cout) for pair in zip(parts, matrices, strict=True)]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
        high = out_size(pixels.shape[1], stride)
        return out.view(n, high, high, cout).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pixels, *matrices = ctx.saved_tensors
        grad = grad.permute(0, 2, 3, 1)
        grad_x = torch.zeros(pixels.shape)
        outs = grad.flatten(1, 2)
        for matrix, (rows, columns, seers, _) in zip(matrices, ctx.seen, strict=True):
            into = grad_x[:, rows, columns]
            into += product(outs[:, seers.start : seers.stop].flatten(1), matrix.t()).view(into.shape)
        weight = ctx.leaf
        sink: Tensor | None = getattr(weight, "into", None)  # see engine.flat.Replica
        given = sink is None
        if sink is None:
            sink = torch.empty_like(weight)
        held = not given and weight.grad is not None
        taps = sink.detach().permute(0, 2, 3, 1)
        spans = [_pairs(pixels.shape[1], ctx.stride, tap) for tap in range(3)]
        for up, (out_rows, rows) in enumerate(spans):
            for along, (out_columns, columns) in enumerate(spans):
                # A tap at a time, which the cache still holds when it is written. Copied: see `as_matrices`.
                out = grad[:, out_rows, out_columns].clone(memory_format=torch.contiguous_format)
                part = pixels[:, rows, columns].clone(memory_format=torch.contiguous_format)
                tap = _of_tap(out, part, ctx.sizes) if out.numel() else torch.zeros(())
                taps[:, up, along].add_(tap) if held else taps[:, up, along].copy_(tap)
        if not given:
            weight.grad = sink
        return grad_x.permute(0, 3, 1, 2), sink if given else None, None, None, None, None


def _of_tap(out: Tensor, part: Tensor, sizes: list[int]) -> Tensor:
    """A tap's gradient: each shard's by itself, added in tree order."""
    pairs = zip(torch.split(out, sizes), torch.split(part, sizes), strict=True)
    return total(product(o.flatten(0, 2).t(), p.flatten(0, 2).t()) for o, p in pairs)


def _pairs(size: int, stride: int, tap: int) -> tuple[slice, slice]:
    """The output rows that use a row of taps, and the rows of the map that they meet there; perhaps none."""
    outs = [out for out in range(out_size(size, stride)) if 0 <= out * stride - 1 + tap < size]
    if not outs:
        return slice(0, 0), slice(0, 0)
    start = outs[0] * stride - 1 + tap
    return slice(outs[0], outs[-1] + 1), slice(start, start + (len(outs) - 1) * stride + 1, stride)


class SmallMapConv2d(nn.Conv2d):
    """`nn.Conv2d` that takes the short way where it is one: fp32 on a CPU, a small output map."""

    kept: Mapping[int, list[Tensor]] = MappingProxyType({})
    """The weights as matrices, by the size of the map."""
    draws: Draws | None = None
    """Says which shards a pass holds (see engine.shardwise); None: one."""

    def begin_step(self) -> None:
        """The weights have changed: make the same matrices anew (see engine.lane)."""
        self.kept = {size: self._matrices(size) for size in self.kept}

    def _matrices(self, size: int) -> list[Tensor]:
        return as_matrices(self.weight, views(size, self.stride[0]))

    def forward(self, x: Tensor) -> Tensor:
        """The convolution."""
        size, stride = x.shape[-1], self.stride[0]
        short = x.shape[-2] == size and out_size(size, stride) <= LARGEST
        if (
            short
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._get_tracing_state()
        ):
            if size not in self.kept:
                self.kept = {**self.kept, size: self._matrices(size)}
            sizes = (len(x),) if self.draws is None else self.draws.sizes
            out: Tensor = _SmallMap.apply(x, self.weight, stride, views(size, stride), self.kept[size], sizes)
            return out
        return super().forward(x)


def shorten(model: nn.Module) -> None:
    """Let every plain 3x3 convolution of a model take the short way."""
    for module in model.modules():
        if type(module) is not nn.Conv2d or module.groups != 1 or module.bias is not None:
            continue
        plain = module.kernel_size == (3, 3) and module.dilation == module.padding == (1, 1)
        if plain and module.stride in ((1, 1), (2, 2)):
            module.__class__ = SmallMapConv2d
