"""3x3 convolutions whose output map is 1x1 or 2x2 as matrix products (CPU).

On such small maps many taps of the kernel fall on padding: 20 of 36 on a 2x2 map, 11 of 36 on a 4x4 map with stride 2.
Here output pixels that see the same part of the input share one matrix product with the taps that meet it, and nothing
is multiplied by padding. Without this the last stage of a ResNet takes a third of its time at 64 px.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rayexp.engine.cpu.matmul import onednn
from rayexp.engine.cpu.taps import count_use, out_size, weight_gradient
from rayexp.engine.rng import Draws

LARGEST = 2
"""Height and width of the largest output map that is computed by products."""
FEW = 128
"""A matrix with fewer rows than this becomes the second operand of a product."""
Taps = tuple[slice, slice]
View = tuple[slice, slice, range, list[Taps]]
"""Rows and columns of the input map that are seen, the output pixels that see them, and the taps of each of these."""


def views(size: int, stride: int) -> list[View]:
    """What the output pixels, see of a `size` x `size` input map, in order; those that see the same share a view."""
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
    """The weight fp32[out, in, 3, 3] as a matrix for each view: fp32[output pixels * out, input pixels * in]."""
    taps = weight.detach().permute(0, 2, 3, 1)
    # Copied even where a view would do: oneDNN is slow on strided rows.
    return [torch.stack([taps[:, up, along] for up, along in view[3]]).flatten(2).flatten(0, 1) for view in seen]


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix.T for fp32[n, k] and fp32[m, k]."""
    # oneDNN rearranges its second operand in every call, which should be the smaller one.
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
        of_weight = None
        if ctx.needs_input_grad[1]:  # it is not frozen
            of_weight = weight_gradient(ctx.leaf, grad, pixels.permute(0, 3, 1, 2), (ctx.stride, ctx.stride), ctx.sizes)
        return grad_x.permute(0, 3, 1, 2), of_weight, None, None, None, None


class SmallMapConvolution:
    """The forward of an `nn.Conv2d`: by matrix products where the output map is small, otherwise as before.

    Attributes:
        kept: the weight as matrices (see `as_matrices`), by the height of the input map, from `begin_step` to
            `end_step`; otherwise empty, and every call makes them from the weight as it is then.
        sizes: the heights of the input maps so far.

    Args:
        conv: 3x3, padding 1, stride 1 or 2, no bias; its forward so far is used for large maps.
        draws: tells the sizes of the shards in a pass; None: a pass is one shard.
    """

    def __init__(self, conv: nn.Conv2d, draws: Draws | None) -> None:
        self.conv, self.draws = conv, draws
        self.otherwise = conv.forward
        self.stride = int(conv.stride[0])
        self.kept: Mapping[int, list[Tensor]] = {}
        self.sizes: set[int] = set()

    def begin_step(self) -> None:
        """The weight stays as it is until `end_step`: make the matrices once."""
        self.kept = {size: self._matrices(size) for size in self.sizes}

    def end_step(self) -> None:
        """The weight may change from now on."""
        self.kept = {}

    def _matrices(self, size: int) -> list[Tensor]:
        return as_matrices(self.conv.weight, views(size, self.stride))

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution: fp32[n, out, h, w] from fp32[n, in, H, W]."""
        size, weight = x.shape[-1], self.conv.weight
        small = (
            x.shape[-2] == size
            and out_size(size, self.stride) <= LARGEST
            and x.dtype == torch.float32
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )
        if small or self.draws is None:  # otherwise shardwise counts
            count_use(weight)
        if not small:
            return self.otherwise(x)
        self.sizes.add(size)
        matrices = self.kept[size] if size in self.kept else self._matrices(size)
        sizes = (len(x),) if self.draws is None else self.draws.rows(len(x))
        out: Tensor = _SmallMap.apply(x, weight, self.stride, views(size, self.stride), matrices, sizes)
        return out


def use_small_map_convolutions(model: nn.Module, draws: Draws | None = None) -> list[SmallMapConvolution]:
    """Give every plain 3x3 convolution of a replica's module a `SmallMapConvolution` as its forward."""
    found = []
    for module in model.modules():
        if type(module) is not nn.Conv2d or module.groups != 1 or module.bias is not None:
            continue
        plain = module.kernel_size == (3, 3) and module.dilation == module.padding == (1, 1)
        if plain and module.padding_mode == "zeros" and module.stride in ((1, 1), (2, 2)):
            found.append(SmallMapConvolution(module, draws))
            module.forward = found[-1]  # type: ignore[assignment]
    return found
