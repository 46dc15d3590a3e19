"""3x3 convolutions on 2x2 maps as one matrix product (CPU).

On a 2x2 map with padding 1, every output pixel sees every input pixel, and 20 of 36 taps fall on padding. Written as
a matrix from (pixel, channel) to (pixel, channel), nothing is wasted; the last stage of a ResNet at 64 px is a third
of its time otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rayexp.engine.matmul import product


def as_matrix(weight: Tensor) -> Tensor:
    """fp32[4 out, 4 in] from fp32[out, in, 3, 3]: output pixel p sees input pixel q through tap q - p + 1."""
    taps = weight.detach().permute(0, 2, 3, 1)
    blocks = [taps[:, 1 - p // 2 : 3 - p // 2, 1 - p % 2 : 3 - p % 2] for p in range(4)]
    return torch.stack(blocks).reshape(4 * weight.shape[0], 4 * weight.shape[1])


class _Map2x2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, matrix: Tensor) -> Tensor:
        n, cin = x.shape[:2]
        pixels = x.permute(0, 2, 3, 1).reshape(n, 4 * cin)
        ctx.save_for_backward(pixels, matrix)
        ctx.shape = weight.shape
        return product(pixels, matrix).view(n, 2, 2, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pixels, matrix = ctx.saved_tensors
        cout, cin = ctx.shape[:2]
        grad = grads[0].permute(0, 2, 3, 1).reshape(len(pixels), 4 * cout)
        grad_x = product(grad, matrix.t()).view(-1, 2, 2, cin).permute(0, 3, 1, 2)
        grad_taps = torch.zeros(cout, 3, 3, cin)
        seen = pixels.t()
        for p, out in enumerate(grad.view(-1, 4, cout).unbind(1)):
            # A quarter of the matrix at a time, which the cache still holds when it is folded.
            part = product(out.t(), seen).view(cout, 2, 2, cin)
            grad_taps[:, 1 - p // 2 : 3 - p // 2, 1 - p % 2 : 3 - p % 2] += part
        return grad_x, grad_taps.permute(0, 3, 1, 2), None


class SmallMapConv2d(nn.Conv2d):
    """`nn.Conv2d` that takes the short way where it is one: fp32 on a CPU, a 2x2 map."""

    matrix: Tensor | None = None

    def begin_step(self) -> None:
        """The weights have changed."""
        self.matrix = None

    def forward(self, x: Tensor) -> Tensor:
        """The convolution."""
        short = x.shape[-2:] == (2, 2) and x.device.type == "cpu" and x.dtype == torch.float32
        if (
            short
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._get_tracing_state()
        ):
            if self.matrix is None:
                self.matrix = as_matrix(self.weight)
            out: Tensor = _Map2x2.apply(x, self.weight, self.matrix)
            return out
        return super().forward(x)


def shorten(model: nn.Module) -> None:
    """Let every plain 3x3 convolution of a model take the short way."""
    for module in model.modules():
        if type(module) is not nn.Conv2d or module.groups != 1 or module.bias is not None:
            continue
        if module.kernel_size == (3, 3) and module.stride == module.dilation == module.padding == (1, 1):
            module.__class__ = SmallMapConv2d
