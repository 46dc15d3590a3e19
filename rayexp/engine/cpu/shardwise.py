"""Several shards in one pass, each shard's gradients computed by themselves and added in tree order (CPU, fp32).

One pass over four shards costs less than four passes: weights are rearranged once, a layer's gradients are added while
they are in the cache, and a gradient buffer is written once. It is allowed where it has the same bits, that is, where
every kernel treats an image alike whatever else is in the batch; engine/passes.py tries that before it relies on it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rayexp.engine.cpu import taps
from rayexp.engine.freezing import FixedBatchNorm
from rayexp.engine.reduction import total
from rayexp.engine.rng import Draws


class _Conv(torch.autograd.Function):
    """`F.conv2d`; `options` are stride, padding, dilation and groups, `sizes` the samples of each shard."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...], sizes: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaf, ctx.bias, ctx.options, ctx.sizes = weight, bias is not None, options, sizes
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        extent = [len(weight)] if ctx.bias else None

        def gradients(grad: Tensor, x: Tensor, of_x: bool, of_weight: bool) -> tuple[Tensor, ...]:
            mask = [of_x, of_weight, of_weight and ctx.bias]
            found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
                grad, x, weight, extent, stride, padding, dilation, False, [0, 0], groups, mask
            )
            return found

        need_x, *of_parameters = ctx.needs_input_grad[:3]
        if not any(of_parameters):  # frozen
            return (gradients(grad, x, True, False)[0] if need_x else None), None, None, None, None
        by_taps = not ctx.bias and taps.pay(weight, x, *ctx.options)
        if len(ctx.sizes) == 1 and not by_taps:
            return *gradients(grad, x, need_x, True), None, None
        grad_x = gradients(grad, x, True, False)[0] if need_x else None
        if by_taps:
            return grad_x, taps.weight_gradient(ctx.leaf, grad, x, stride, ctx.sizes), None, None, None
        parts = (gradients(g, p, False, True)[1:] for g, p in _split(ctx.sizes, grad, x))
        if not ctx.bias:
            return grad_x, total(of_weight for of_weight, _ in parts), None, None, None
        of_weight, of_bias = zip(*parts, strict=True)
        return grad_x, total(of_weight), total(of_bias), None, None


class _Linear(torch.autograd.Function):
    """`F.linear`, shard by shard: the order of additions in a product may depend on its number of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return torch.cat([F.linear(part, weight, bias) for part in torch.split(x, list(sizes))])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        pairs = [(g.flatten(0, -2), p.flatten(0, -2)) for g, p in _split(ctx.sizes, grad, x)]
        grad_x = torch.cat([g @ weight for g, _ in pairs]).view(x.shape)
        of_weight, of_bias = ctx.needs_input_grad[1:3]  # not of what is frozen
        return (
            grad_x,
            total(g.t() @ part for g, part in pairs) if of_weight else None,
            total(g.sum(0) for g, _ in pairs) if of_bias else None,
            None,
        )


def _split(sizes: Sequence[int], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(t, list(sizes)) for t in tensors), strict=True)


def can_keep_apart(model: nn.Module) -> bool:
    """Whether every layer with parameters is of a kind that `shardwise` keeps apart; a subclass is another kind, since
    its forward may do something else."""
    owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    return all(
        (type(m) is nn.Conv2d and m.padding_mode == "zeros" and not isinstance(m.padding, str))
        or type(m) is nn.Linear
        or type(m) in (nn.BatchNorm1d, nn.BatchNorm2d, FixedBatchNorm)
        for m in owners
    )


def keep_gradients_apart(model: nn.Module, draws: Draws) -> None:
    """Make a replica's module, for which `can_keep_apart` holds, keep the gradients of the shards of a pass apart; for
    batch norms `per_shard` does so.

    Args:
        draws: tells the sizes of the shards in a pass.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.forward = functools.partial(_conv, module, draws)  # type: ignore[method-assign]
        elif type(module) is nn.Linear:
            module.forward = functools.partial(_linear, module, draws)  # type: ignore[method-assign]


def _conv(module: nn.Conv2d, draws: Draws, x: Tensor) -> Tensor:
    taps.count_use(module.weight)
    options = module.stride, module.padding, module.dilation, module.groups
    out: Tensor = _Conv.apply(x, module.weight, module.bias, options, draws.rows(len(x)))
    return out


def _linear(module: nn.Linear, draws: Draws, x: Tensor) -> Tensor:
    out: Tensor = _Linear.apply(x, module.weight, module.bias, draws.rows(len(x)))
    return out
