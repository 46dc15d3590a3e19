"""Cross-entropy over a large vocabulary in which the logits are never whole.

    loss_t = log sum_v exp(x_tv) - x_t,target(t)        x = hidden @ weight.T + bias

The vocabulary goes by in blocks. A block's logits become e = exp(x - peak), with the block's own largest logit of
each token as peak, and sum up to the block's share of the partition function; when all blocks have gone by, the
softmax is p = e * exp(peak - log_sum), a factor per token and block. So the gradient needs no second exponential, and
the factor is applied to the narrow `hidden` rather than to the wide e. The e of the first blocks are kept for the
backward pass, up to a fixed number of bytes; the others are computed again, with the same bits.

Where a parameter's `.grad` is there already, its gradient is added to it in place, block by block (for the embedding:
row by row), and no dense temporary is made. Such a parameter fires no autograd hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayexp.engine.matmul import product

# Words in a block, and bytes of exponentials kept for the backward pass: what a core's cache and a GPU like best.
BLOCK = {"cpu": 2048, "cuda": 8192}
KEEP = {"cpu": 32 << 20, "cuda": 1 << 30}


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it writes into gradients
def blocked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    block: int | None = None,
    keep: int | None = None,
) -> Tensor:
    """Cross-entropy of every token, in nats: `F.cross_entropy(hidden @ weight.T + bias, targets, reduction="none")`.

    Under autocast the products are taken in its type, everything else in float32.

    Args:
        hidden: [tokens, features].
        weight: [words, features].
        bias: [words] or None.
        targets: int64[tokens].
        block: words in a block.
        keep: bytes of exponentials kept for the backward pass.

    Returns:
        float32[tokens] (float64 where `hidden` is).
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if not torch.is_grad_enabled():
        keep = 0
    elif keep is None:
        keep = KEEP.get(kind, KEEP["cuda"])
    losses: Tensor = _CrossEntropy.apply(
        hidden, weight, bias, targets, block or BLOCK.get(kind, BLOCK["cuda"]), keep, dtype
    )
    return losses


@torch.compiler.disable  # type: ignore[untyped-decorator]
def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """`F.embedding(tokens, weight)`, whose gradient goes into `weight.grad` row by row where that is there."""
    vectors: Tensor = _Embedding.apply(tokens, weight)
    return vectors


def _blocks(words: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, words)) for start in range(0, words, block))


def _sink(leaf: Tensor | None, needed: bool) -> Tensor | None:
    """Where a gradient is added up: the one that the leaf holds already, or a new one, or None where none is needed."""
    if leaf is None or not needed:
        return None
    held = leaf.grad if leaf.is_leaf else None
    return torch.zeros_like(leaf) if held is None else held


def _handed_on(leaf: Tensor | None, sink: Tensor | None) -> Tensor | None:
    """What autograd still has to add: nothing, where the leaf holds the sum already."""
    return None if leaf is None or (leaf.is_leaf and leaf.grad is sink) else sink


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        block: int,
        keep: int,
        dtype: torch.dtype,
    ) -> Tensor:
        peaks, sums, chosen, kept = [], [], [], []
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = hidden.to(dtype)
            for part in _blocks(len(weight), block):
                logits = _logits(narrow, weight, bias, part)
                peak = logits.amax(1, keepdim=True)
                inside = (targets - part.start).clamp_(0, part.stop - part.start - 1)
                chosen.append(logits.gather(1, inside[:, None]))
                e = logits.sub_(peak).exp_()
                peaks.append(peak)
                sums.append(e.sum(1, keepdim=True))
                keep -= e.numel() * e.element_size()
                kept.append(e if keep >= 0 else None)
            peak, total = torch.cat(peaks, 1), torch.cat(sums, 1)
            log_sum = torch.logsumexp(peak + total.log_(), 1)
            target = torch.cat(chosen, 1).gather(1, (targets // block)[:, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets, peak, log_sum)
        ctx.kept, ctx.leaves, ctx.block, ctx.dtype = kept, (weight, bias), block, dtype
        return log_sum - target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, peak, log_sum = ctx.saved_tensors
        weight_grad = _sink(ctx.leaves[0], ctx.needs_input_grad[1])
        bias_grad = _sink(ctx.leaves[1], ctx.needs_input_grad[2])
        wide = hidden.to(log_sum.dtype)
        hidden_grad = torch.zeros_like(wide)
        with torch.autocast(hidden.device.type, enabled=False):
            scale = (peak - log_sum[:, None]).exp_().mul_(grad[:, None]).t().contiguous()
            narrow, across = hidden.to(ctx.dtype), wide.t().contiguous()
            for i, part in enumerate(_blocks(len(weight), ctx.block)):
                e, ctx.kept[i] = ctx.kept[i], None
                if e is None:
                    e = _logits(narrow, weight, bias, part).sub_(peak[:, i : i + 1]).exp_()
                factor = scale[i]
                if bias_grad is not None:
                    bias_grad[part].addmv_(e.t(), factor)
                e = e.to(ctx.dtype)
                if weight_grad is not None:
                    weight_grad[part].add_(product(e.t(), (across * factor).to(ctx.dtype)))
                hidden_grad.addcmul_(product(e, weight[part].to(ctx.dtype).t()), factor[:, None])
            if weight_grad is not None:
                weight_grad.index_add_(0, targets, wide * -grad[:, None])
            if bias_grad is not None:
                bias_grad.index_add_(0, targets, -grad)
            hidden_grad.addcmul_(weight.index_select(0, targets), grad[:, None], value=-1)
        weight_out, bias_out = map(_handed_on, ctx.leaves, (weight_grad, bias_grad))
        return hidden_grad.to(hidden.dtype), weight_out, bias_out, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    """A block's logits in float32 (or float64)."""
    if hidden.dtype == weight.dtype:
        return product(hidden, weight[part], None if bias is None else bias[part])
    logits = product(hidden, weight[part].to(hidden.dtype)).float()
    return logits if bias is None else logits.add_(bias[part])


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.leaf = weight
        return weight.index_select(0, tokens.reshape(-1)).view(*tokens.shape, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        found = _sink(ctx.leaf, ctx.needs_input_grad[1])
        if found is not None:
            found.index_add_(0, tokens.reshape(-1), grad.reshape(-1, found.shape[1]).to(found.dtype))
        return None, _handed_on(ctx.leaf, found)
