"""The gradient of a 3x3 convolution's weight tap by tap and shard by shard, as matrix products (CPU).

A tap is one of the nine positions (i, j) of the kernel; its gradient is a matrix [out, in]. It is one product over the
pixels where the tap does not fall on padding, and it is still in the cache when the next shard's gradient is added. On
small maps with many channels that costs less than oneDNN's own weight gradient, which rearranges the whole weight for
every shard.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rayexp.engine.cpu.matmul import product
from rayexp.engine.reduction import total

LARGEST = 4
"""Height and width of the largest output map for which taps are faster."""
WIDE = 1 << 15
"""Input channels times output channels from which they are faster."""


def pay(
    weight: Tensor, x: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Whether this convolution's weight gradient can be computed tap by tap, and is faster so."""
    if weight.shape[2:] != (3, 3) or (*padding, *dilation, groups) != (1, 1, 1, 1, 1) or x.dtype != torch.float32:
        return False
    largest = max(out_size(size, step) for size, step in zip(x.shape[2:], stride, strict=True))
    return largest <= LARGEST and weight.shape[0] * weight.shape[1] >= WIDE


def out_size(size: int, stride: int) -> int:
    """Height or width of the output for an input of height or width `size`, with a 3x3 kernel and padding 1."""
    return (size - 1) // stride + 1


def count_use(weight: Tensor) -> None:
    """Count that a convolution uses this weight in the present pass; `ReplicaModel.finish_pass` resets the count."""
    weight.uses = getattr(weight, "uses", 0) + 1  # type: ignore[attr-defined]


def weight_gradient(
    weight: nn.Parameter, grad: Tensor, x: Tensor, stride: Sequence[int], sizes: Sequence[int]
) -> Tensor | None:
    """The weight gradient of a 3x3 convolution with padding 1, each shard's by itself, added in tree order.

    Args:
        weight: fp32[out, in, 3, 3].
        grad: fp32[n, out, h, w], the output's gradient.
        x: fp32[n, in, H, W], the input.
        stride: of rows and columns.
        sizes: images of each shard.

    Returns:
        fp32[out, in, 3, 3]; or None where it has been written into the gradient buffer (see `ReplicaModel`).
    """
    # Where a pass uses a weight several times, autograd must add these gradients up before another shard's is added.
    sink: Tensor | None = getattr(weight, "into", None) if getattr(weight, "uses", 1) == 1 else None
    given = sink is None
    if sink is None:
        sink = torch.empty_like(weight)
    held = not given and weight.grad is not None
    taps = sink.detach().permute(0, 2, 3, 1)
    pixels, outs = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    down, along = ([_pairs(*dim, tap) for tap in range(3)] for dim in zip(x.shape[2:], stride, strict=True))
    for i, (out_rows, rows) in enumerate(down):
        for j, (out_columns, columns) in enumerate(along):
            # Copied: oneDNN is slow on strided rows.
            out = outs[:, out_rows, out_columns].clone(memory_format=torch.contiguous_format)
            part = pixels[:, rows, columns].clone(memory_format=torch.contiguous_format)
            tap = _of_tap(out, part, sizes) if out.numel() else torch.zeros(())
            taps[:, i, j].add_(tap) if held else taps[:, i, j].copy_(tap)
    if given:
        return sink
    weight.grad = sink
    return None


def _of_tap(out: Tensor, part: Tensor, sizes: Sequence[int]) -> Tensor:
    pairs = zip(torch.split(out, list(sizes)), torch.split(part, list(sizes)), strict=True)
    return total(product(o.flatten(0, 2).t(), p.flatten(0, 2).t()) for o, p in pairs)


def _pairs(size: int, stride: int, tap: int) -> tuple[slice, slice]:
    """The output rows for which row `tap` of the kernel is not on padding, and the input rows that it meets."""
    outs = [out for out in range(out_size(size, stride)) if 0 <= out * stride - 1 + tap < size]
    if not outs:
        return slice(0, 0), slice(0, 0)
    start = outs[0] * stride - 1 + tap
    return slice(outs[0], outs[-1] + 1), slice(start, start + (len(outs) - 1) * stride + 1, stride)
