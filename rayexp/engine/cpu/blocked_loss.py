"""Cross-entropy over a large vocabulary, computed in blocks so that the logits never exist as a whole.

    loss_t = log sum_v exp(x_tv) - x_t,target(t)        x = hidden @ weight.T + bias

The vocabulary is processed in blocks. A block's logits become e = exp(x - peak), where peak is each token's largest
logit within the block, and their sum is the block's share of the partition function. After the last block the softmax
is p = e * exp(peak - log_sum), a factor per token and block. So the gradient needs no second exponential, and the
factor is applied to the narrow `hidden` instead of the wide e. The e of the first blocks are kept for the backward
pass, up to a fixed number of bytes; the others are computed again, with the same bits.

A parameter's gradient is written straight into its gradient buffer, block by block (of an embedding: row by row),
without a dense temporary: it is added to `.grad` if there is one, otherwise written into `.into` (see
engine/gradients.py, ReplicaModel). Each block is complete before it is added, so the result has the same bits as adding
the gradients of two passes as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayexp.engine.cpu.matmul import product

# Words in a block, and bytes of exponentials kept for the backward pass; chosen for a core's cache.
BLOCK = 2048
KEEP = 32 << 20


def blocked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    block: int = BLOCK,
    keep: int = KEEP,
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
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    keep = keep if torch.is_grad_enabled() else 0
    losses: Tensor = _CrossEntropy.apply(hidden, weight, bias, targets, block, keep, dtype)
    return losses


def blocked_embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """`F.embedding(tokens, weight)`, whose gradient is written into its buffer row by row."""
    vectors: Tensor = _Embedding.apply(tokens, weight)
    return vectors


def _blocks(words: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, words)) for start in range(0, words, block))


class _Sink:
    """Where a parameter's gradient goes.

    Attributes:
        tensor: of the parameter's shape.
        adds: whether the gradient is added to what `tensor` holds; otherwise it overwrites it.
        shared: whether `tensor` may hold another shard's gradient, which must be added to as a whole.

    Args:
        leaf: the parameter.
    """

    def __init__(self, leaf: Tensor) -> None:
        held = leaf.grad if leaf.is_leaf else None
        into: Tensor | None = getattr(leaf, "into", None)
        self.adds, self.shared = held is not None, into is not None
        self._leaf = leaf if self.adds or self.shared else None
        self.tensor = held if held is not None else torch.empty_like(leaf) if into is None else into

    @staticmethod
    def of(leaf: Tensor | None, needed: bool) -> _Sink | None:
        """None where no gradient is needed."""
        return _Sink(leaf) if leaf is not None and needed else None

    def put(self, part: slice, found: Tensor) -> None:
        """Write a part of the gradient, which is complete."""
        if self.adds:
            self.tensor[part].add_(found)
        else:
            self.tensor[part].copy_(found)

    @staticmethod
    def hand_on(sink: _Sink | None) -> Tensor | None:
        """What is left for autograd to add: None where the parameter has its gradient already."""
        if sink is None:
            return None
        if sink._leaf is None:
            return sink.tensor
        sink._leaf.grad = sink.tensor
        return None


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
        with torch.autocast("cpu", enabled=False):
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
        weight_sink, bias_sink = map(_Sink.of, ctx.leaves, ctx.needs_input_grad[1:3])
        wide = hidden.to(log_sum.dtype)
        hidden_grad = torch.zeros_like(wide)
        with torch.autocast("cpu", enabled=False):
            scale = (peak - log_sum[:, None]).exp_().mul_(grad[:, None]).t().contiguous()
            narrow, across = hidden.to(ctx.dtype), wide.t().contiguous()
            of_targets = _by_block(wide * -grad[:, None], targets, len(weight), ctx.block)
            of_bias = wide.new_empty(len(weight))
            for i, part in enumerate(_blocks(len(weight), ctx.block)):
                e, ctx.kept[i] = ctx.kept[i], None
                if e is None:
                    e = _logits(narrow, weight, bias, part).sub_(peak[:, i : i + 1]).exp_()
                factor = scale[i]
                if bias_sink is not None:
                    torch.mv(e.t(), factor, out=of_bias[part])
                e = e.to(ctx.dtype)
                if weight_sink is not None:
                    found = product(e.t(), (across * factor).to(ctx.dtype)).to(wide.dtype)
                    weight_sink.put(part, found.index_add_(0, *of_targets[i]))
                hidden_grad.addcmul_(product(e, weight[part].to(ctx.dtype).t()), factor[:, None])
            if bias_sink is not None:
                bias_sink.put(slice(None), of_bias.index_add_(0, targets, -grad))
            hidden_grad.addcmul_(weight.index_select(0, targets), grad[:, None], value=-1)
        weight_grad, bias_grad = map(_Sink.hand_on, (weight_sink, bias_sink))
        return hidden_grad.to(hidden.dtype), weight_grad, bias_grad, None, None, None, None


def _by_block(values: Tensor, targets: Tensor, words: int, block: int) -> list[tuple[Tensor, Tensor]]:
    """For each block of the vocabulary the tokens whose targets lie in it: the targets, counted from the block's first
    word, and their rows of `values`."""
    targets, order = targets.sort(stable=True)
    counts = torch.bincount(targets // block, minlength=-(-words // block)).tolist()
    rows, summands = (torch.split(x, counts) for x in (targets % block, values[order]))
    return list(zip(rows, summands, strict=True))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    """The logits of a block: float32 (or float64) [tokens, words of the block]."""
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
        sink = _Sink.of(ctx.leaf, ctx.needs_input_grad[1])
        if sink is not None:
            words, vectors = tokens.reshape(-1), grad.reshape(-1, grad.shape[-1]).to(sink.tensor.dtype)
            if not sink.adds:
                sink.tensor.zero_()
            elif sink.shared:
                words, vectors = _summed(words, vectors)
            sink.tensor.index_add_(0, words, vectors)
        return None, _Sink.hand_on(sink)


def _summed(words: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The words without repetition, and the sum of each word's vectors in their order. Both keep their length: the rest
    is filled with one of the words, and zeros."""
    ordered, order = words.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    group = first.cumsum(0) - 1
    rows = ordered[:1].expand_as(ordered).clone().scatter_(0, group, ordered)
    return rows, torch.zeros_like(vectors).index_add_(0, group, vectors[order])
