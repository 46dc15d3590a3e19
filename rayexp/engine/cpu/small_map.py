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

from rayexp.engine.cpu.matmul import onednn
from rayexp.engine.cpu.taps import out_size, used, weight_gradient
from rayexp.engine.rng import Draws

LARGEST = 2
"""Height and width of the largest output map that takes the short way."""
FEW = 128
"""Fewer rows than this are the second operand of a product."""
Taps = tuple[slice, slice]
View = tuple[slice, slice, range, list[Taps]]
"""Rows and columns of the map that are seen, the output pixels that see them, and for each of these its taps."""


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
    return onednn(matrix, rows).t().contiguous() if len(rows) < FEW else onednn(rows, matrix)


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
        grad_x = torch.zeros(pixels.shape)
        outs = grad.permute(0, 2, 3, 1).flatten(1, 2)
        for matrix, (rows, columns, seers, _) in zip(matrices, ctx.seen, strict=True):
            into = grad_x[:, rows, columns]
            into += onednn(outs[:, seers.start : seers.stop].flatten(1), matrix.t()).view(into.shape)
        of_weight = weight_gradient(ctx.leaf, grad, pixels.permute(0, 3, 1, 2), (ctx.stride, ctx.stride), ctx.sizes)
        return grad_x.permute(0, 3, 1, 2), of_weight, None, None, None, None


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
        short = (
            x.shape[-2] == size
            and out_size(size, stride) <= LARGEST
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._get_tracing_state()
        )
        if short or self.draws is None:  # else engine.shardwise counts
            used(self.weight)
        if short:
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
