"""3x3 convolutions onto 2x2 maps as matrix products (CPU).

On so small a map most taps fall on padding: 20 of 36 from a 2x2 map, 11 of 36 from a 4x4 map with stride 2. One
product for what is seen at a time, with the taps that see it, wastes nothing. The last
stage of a ResNet at 64 px is a third of its time otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rayexp.engine.matmul import product

OUT = 2
"""Height and width of the output maps that take the short way."""
Taps = tuple[slice, slice]
View = tuple[slice, slice, range, list[Taps]]
"""Rows and columns of the map that are seen, the output pixels that see them, and for each of these its taps."""


def views(size: int, stride: int) -> list[View]:
    """What the OUT x OUT output pixels see of a map of `size` x `size` with padding 1; neighbours that see the same
    share a view."""
    spans = []
    for out in range(OUT):
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


class _SmallMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seen: Sequence[View], matrices: Sequence[Tensor]) -> Tensor:
        n, cout = len(x), len(weight)
        pixels = x.permute(0, 2, 3, 1)
        parts = [pixels[:, rows, columns].flatten(1) for rows, columns, _, _ in seen]
        ctx.save_for_backward(*parts, *matrices)
        ctx.x, ctx.weight, ctx.seen = pixels.shape, weight.shape, seen
        outs = [product(*pair).view(n, -1, cout) for pair in zip(parts, matrices, strict=True)]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
        return out.view(n, OUT, OUT, cout).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        parts, matrices = ctx.saved_tensors[: len(ctx.seen)], ctx.saved_tensors[len(ctx.seen) :]
        cout, cin = ctx.weight[:2]
        grad = grads[0].permute(0, 2, 3, 1).flatten(1, 2)
        grad_x, grad_taps = torch.zeros(ctx.x), torch.zeros(cout, 3, 3, cin)
        for part, matrix, (rows, columns, pixels, taps) in zip(parts, matrices, ctx.seen, strict=True):
            into = grad_x[:, rows, columns]
            outs = grad[:, pixels.start : pixels.stop]
            into += product(outs.flatten(1), matrix.t()).view(into.shape)
            # A pixel at a time, which the cache still holds when it is folded.
            for out, (up, along) in zip(outs.unbind(1), taps, strict=True):
                into = grad_taps[:, up, along]
                into += product(out.t(), part.t()).view(into.shape)
        return grad_x.permute(0, 3, 1, 2), grad_taps.permute(0, 3, 1, 2), None, None


class SmallMapConv2d(nn.Conv2d):
    """`nn.Conv2d` that takes the short way where it is one: fp32 on a CPU, a 2x2 output."""

    matrices: list[Tensor] | None = None

    def begin_step(self) -> None:
        """The weights have changed."""
        self.matrices = None

    def forward(self, x: Tensor) -> Tensor:
        """The convolution."""
        size, stride = x.shape[-1], self.stride[0]
        short = x.shape[-2] == size and size in (OUT * stride, OUT * stride - 1)
        if (
            short
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._get_tracing_state()
        ):
            seen = views(size, stride)
            if self.matrices is None:
                self.matrices = as_matrices(self.weight, seen)
            out: Tensor = _SmallMap.apply(x, self.weight, seen, self.matrices)
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
