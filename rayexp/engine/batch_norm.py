"""Batch norm over each shard of a pass (ghost batch normalisation: Hoffer, Hubara, Soudry 2017): the same mathematics
however many shards are in the pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.engine.reduction import total
from rayexp.engine.rng import Draws

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FORWARDS = {kind.forward for kind in BATCH_NORMS}
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def folded(norm: BatchNorm, shards: int, x: Tensor) -> Tensor:
    """Normalise shards of equal size as if each had channels of its own: a few large kernels instead of many small
    ones, on which a GPU idles. Adds the shards' statistics to the norm's.

    Args:
        norm: its running statistics are fp32[channels].
        shards: how many of them lie in `x`, one after another.
        x: [samples of all shards, channels, ...].

    Returns:
        Of the shape and dtype of `x`, the channels last in memory.
    """
    channels = x.shape[1]
    statistics = norm.running_mean.new_zeros(2, shards * channels)  # type: ignore[union-attr]
    weight, bias = (None if each is None else each.repeat(shards) for each in (norm.weight, norm.bias))
    # [shards * samples, channels, ...] -> [samples, ..., shards * channels]
    last = x.movedim(1, -1)
    wide = last.view(shards, -1, *last.shape[1:]).movedim(0, -2).flatten(-2)
    # With momentum 1 the running statistics become each shard's mean and unbiased variance.
    out = F.batch_norm(wide.movedim(-1, 1), statistics[0], statistics[1], weight, bias, True, 1.0, norm.eps)
    with torch.no_grad():
        found = statistics.view(2, shards, channels).sum(1)
        norm.running_mean.add_(found[0])  # type: ignore[union-attr]
        norm.running_var.add_(found[1])  # type: ignore[union-attr]
    apart = out.movedim(1, -1)
    return apart.view(*apart.shape[:-1], shards, channels).movedim(-2, 0).flatten(0, 1).movedim(-1, 1)


class _PerShard(torch.autograd.Function):
    """Normalises each shard by itself, writing into one output (no concatenation).

    `sums` are two fp32[channels], to which it adds the shards' means and unbiased variances.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], eps: float, sums: Any
    ) -> Tensor:
        out = torch.empty_like(x)
        saved, means, variances = [], [], []
        for part, into in zip(torch.split(x, list(sizes)), torch.split(out, list(sizes)), strict=True):
            mean, var = torch.zeros_like(sums[0]), torch.zeros_like(sums[1])
            # With momentum 1 the running statistics become this shard's mean and unbiased variance.
            m, s = torch.empty_like(mean), torch.empty_like(var)
            torch.native_batch_norm(part, weight, bias, mean, var, True, 1.0, eps, out=(into, m, s))
            saved += [m, s]
            means.append(mean)
            variances.append(var)
        sums[0].add_(total(means))
        sums[1].add_(total(variances))
        ctx.save_for_backward(x, weight, *saved)
        ctx.sizes, ctx.eps = list(sizes), eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        grad_x, of_weight, of_bias = torch.empty_like(x), [], []
        split = [torch.split(t, ctx.sizes) for t in (x, grads[0], grad_x)]
        for i, (part, grad, into) in enumerate(zip(*split, strict=True)):
            mean, invstd = saved[2 * i], saved[2 * i + 1]
            gx, gw, gb = torch.ops.aten.native_batch_norm_backward(
                grad, part, weight, None, None, mean, invstd, True, ctx.eps, [True, True, True]
            )
            into.copy_(gx)
            of_weight.append(gw)
            of_bias.append(gb)
        return grad_x, total(of_weight), total(of_bias), None, None, None


def per_shard(model: nn.Module, draws: Draws, compiled: bool = False) -> None:
    """Make every batch norm of a replica normalise each shard by itself, and add up the shards' statistics.

    Args:
        compiled: whether torch.compile makes a kernel of it. It is then written as one formula over all shards, where
            they are equal: a compiler sees through that, but not through `_PerShard`.
    """
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            make = _one_by_one if type(module).forward not in _FORWARDS else _formula if compiled else _forward
            module.forward = make(module, draws)  # type: ignore[method-assign]


def _formula(norm: BatchNorm, draws: Draws) -> Any:
    one_by_one = _forward(norm, draws)

    def forward(x: Tensor) -> Tensor:
        shards, each = len(draws.sizes), draws.rows(len(x))[0]
        if len(set(draws.sizes)) > 1:
            unequal: Tensor = one_by_one(x)
            return unequal
        parts = x.view(shards, each, *x.shape[1:]).float()
        across = [i for i in range(parts.ndim) if i not in (0, 2)]  # [shards, samples, channels, ...]
        variance, mean = torch.var_mean(parts, across, correction=0, keepdim=True)
        terms = each * math.prod(x.shape[2:])
        if norm.running_mean is not None and norm.running_var is not None:
            with torch.no_grad():
                norm.running_mean.add_(mean.flatten(1).sum(0))
                norm.running_var.add_(variance.flatten(1).sum(0) * (terms / max(1, terms - 1)))
        out = (parts - mean) * torch.rsqrt(variance + norm.eps)
        if norm.affine:
            shape = (-1, *[1] * (x.ndim - 2))
            out = out * norm.weight.view(shape) + norm.bias.view(shape)
        result: Tensor = out.flatten(0, 1).to(x.dtype)
        return result

    return forward


def _forward(norm: BatchNorm, draws: Draws) -> Any:
    def forward(x: Tensor) -> Tensor:
        if x.is_cuda and len(set(draws.sizes)) == 1 and norm.running_mean is not None:
            return folded(norm, len(draws.sizes), x)
        sums = (norm.running_mean, norm.running_var)
        if sums[0] is None:  # it keeps no statistics
            kind = torch.promote_types(x.dtype, torch.float32)
            mean, variance = torch.zeros(2, norm.num_features, device=x.device, dtype=kind)
            sums = mean, variance
        weight = norm.weight if norm.affine else torch.ones_like(sums[0])  # type: ignore[arg-type]
        bias = norm.bias if norm.affine else torch.zeros_like(sums[0])  # type: ignore[arg-type]
        out: Tensor = _PerShard.apply(x, weight, bias, draws.rows(len(x)), norm.eps, sums)
        return out

    return forward


def _one_by_one(norm: BatchNorm, draws: Draws) -> Any:
    """Of a subclass that does more than to normalise: its own forward, shard by shard."""
    own = norm.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sums = norm.running_mean, norm.running_var
        parts, statistics = [], []
        for part in torch.split(x, draws.rows(len(x))):
            if sums[0] is not None and sums[1] is not None:
                norm.running_mean, norm.running_var = torch.zeros_like(sums[0]), torch.zeros_like(sums[1])
            parts.append(own(part, *args, **kwargs))
            # Cloned: a backward pass refuses statistics that have changed since.
            statistics.append([None if s is None else s.clone() for s in (norm.running_mean, norm.running_var)])
        norm.running_mean, norm.running_var = sums
        for into, each in zip(sums, zip(*statistics, strict=True), strict=True):
            if into is not None:
                into.add_(total(each))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return forward
