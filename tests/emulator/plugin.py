"""Puts operations.cpp in the place of CUDA's kernels once PyTorch is imported, and what has no kernel on a CPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import emulator_operations  # built by run.py
import torch
from torch import Tensor

Sizes = Sequence[int]


def rms_norm_backward(
    of_y: Tensor, x: Tensor, shape: Sizes, scale: Tensor, weight: Tensor | None, mask: Sequence[bool]
) -> tuple[Tensor, Tensor | None]:
    """Of y = x * scale * weight, where scale is one over the root of the mean square."""
    normed = tuple(range(x.dim() - len(shape), x.dim()))
    up, straight = of_y.float(), x.float() * scale
    inner = up if weight is None else up * weight.float()
    of_x = (inner - straight * (inner * straight).mean(normed, keepdim=True)) * scale
    of_weight = None if weight is None else (up * straight).sum(tuple(range(normed[0]))).to(weight.dtype)
    return of_x.to(x.dtype), of_weight


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float | None) -> Tensor:
    scores = query.float() @ key.float().mT * (scale or 1 / math.sqrt(query.shape[-1]))
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    return result.to(like.dtype).transpose(1, 2).contiguous().transpose(1, 2)  # [batch, time, heads, size] in memory


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, *_: Any,
    scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """softmax(query key' scale) value, and the logarithm of each row's sum."""
    assert dropout == 0
    scores = _scores(query, key, causal, scale)
    sums = scores.logsumexp(-1)
    y = _laid_out((scores - sums[..., None]).exp() @ value.float(), query)
    none, state = query.new_empty(0), query.new_empty(0, dtype=torch.uint64)
    return y, sums, none, none, query.shape[2], key.shape[2], state, state, none


def flash_attention_backward(
    of_y: Tensor, query: Tensor, key: Tensor, value: Tensor, y: Tensor, sums: Tensor, *rest: Any,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Dao et al. 2022, appendix B.4."""
    causal, factor = rest[5], scale or 1 / math.sqrt(query.shape[-1])
    weights, up = (_scores(query, key, causal, scale) - sums[..., None]).exp(), of_y.float()
    of_scores = weights * (up @ value.float().mT - (up * y.float()).sum(-1, keepdim=True)) * factor
    return (
        _laid_out(of_scores @ key.float(), query),
        _laid_out(of_scores.mT @ query.float(), query),
        _laid_out(weights.mT @ up, query),
    )


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, wanted: bool, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The same for every type; without a bias."""
    assert bias is None
    y, sums, *_ = flash_attention(query, key, value, dropout, causal, scale=scale)
    state = query.new_empty((), dtype=torch.int64)
    return y, sums, state, state


def efficient_attention_backward(
    of_y: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, y: Tensor, sums: Tensor,
    seed: Tensor, offset: Tensor, dropout: float, mask: Sequence[bool], causal: bool = False, *,
    scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Its gradients."""
    ignored = (None, None, 0, 0, dropout)
    return (*flash_attention_backward(of_y, query, key, value, y, sums, *ignored, causal, scale=scale), None)


def lstm_cell(
    of_x: Tensor, of_h: Tensor, c: Tensor, bias_x: Tensor | None = None, bias_h: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The next h and c, and the gates: in, forget, cell, out."""
    gates = of_x + of_h if bias_x is None else of_x + bias_x + of_h + bias_h
    i, f, g, o = (gate.tanh() if n == 2 else gate.sigmoid() for n, gate in enumerate(gates.chunk(4, 1)))
    after = f * c + i * g
    return o * after.tanh(), after, torch.cat([i, f, g, o], 1)


def lstm_cell_backward(
    of_h: Tensor | None, of_c: Tensor | None, c: Tensor, after: Tensor, gates: Tensor, biased: bool
) -> tuple[Tensor | None, ...]:
    """Of the gates before they are squashed, of c and of a bias."""
    (i, f, g, o), bent = gates.chunk(4, 1), after.tanh()
    of_h, of_c = (torch.zeros_like(c) if it is None else it for it in (of_h, of_c))
    inner = of_h * o * (1 - bent**2) + of_c
    of_gates = torch.cat(
        [inner * g * i * (1 - i), inner * c * f * (1 - f), inner * i * (1 - g**2), of_h * bent * o * (1 - o)], 1
    )
    return of_gates, inner * f, of_gates.sum(0) if biased else None


def gru_cell(
    of_x: Tensor, of_h: Tensor, h: Tensor, bias_x: Tensor | None = None, bias_h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The next h, and what its gradient takes."""
    if bias_x is not None and bias_h is not None:
        of_x, of_h = of_x + bias_x, of_h + bias_h
    (xr, xz, xn), (hr, hz, hn) = of_x.chunk(3, 1), of_h.chunk(3, 1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return n + z * (h - n), torch.cat([r, z, n, h, hn], 1)


def gru_cell_backward(of_h: Tensor, kept: Tensor, biased: bool) -> tuple[Tensor | None, ...]:
    """Of both products, of h and of both biases."""
    r, z, n, h, hn = kept.chunk(5, 1)
    of_n = of_h * (1 - z) * (1 - n**2)
    of_r, of_z = of_n * hn * r * (1 - r), of_h * (h - n) * z * (1 - z)
    both = [torch.cat([of_r, of_z, last], 1) for last in (of_n, of_n * r)]
    return *both, of_h * z, *(it.sum(0) if biased else None for it in both)


SUBSTITUTES = {
    "_fused_rms_norm_backward": rms_norm_backward,
    "_scaled_dot_product_efficient_attention": efficient_attention,
    "_scaled_dot_product_efficient_attention_backward": efficient_attention_backward,
    "_scaled_dot_product_flash_attention": flash_attention,
    "_scaled_dot_product_flash_attention_backward": flash_attention_backward,
    "_thnn_fused_gru_cell": gru_cell,
    "_thnn_fused_gru_cell_backward": gru_cell_backward,
    "_thnn_fused_lstm_cell": lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": lstm_cell_backward,
}


def install() -> None:
    """For this process."""
    torch.cuda.init()
    # Its handles cannot be made. What PyTorch takes instead is replaced.
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    global library  # its kernels live as long as it does
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that are replaced
        emulator_operations.install()
        for name, function in SUBSTITUTES.items():
            library.impl(name, function, "CUDA")
