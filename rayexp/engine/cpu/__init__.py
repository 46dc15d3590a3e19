"""What makes a CPU fast. This file is the one place where each part is put to use, in one line; `cpu_kernels: false`
turns all of it off, and PyTorch's own operations compute the same mathematics.

    shardwise      several shards in one pass, each shard's gradients by themselves                        (exact, fp32)
    small_map      3x3 convolutions onto maps of 1x1 and 2x2 as matrix products                                   (fp32)
    taps           the weight gradient of 3x3 convolutions tap by tap               (used by shardwise and small_map)
    pooling        a ResNet's stem pools before it rectifies                          (the same bits, on a GPU too)
    blocked_loss   cross-entropy without the whole logits; gradients written straight into their buffer
    matmul         oneDNN's matrix products where they are faster than MKL's   (used by small_map, taps, blocked_loss)
    memory         glibc keeps freed memory

Rounding depends on the switch, so it is a key of the configuration, which a run and all its workers share. On a GPU the
bits do not depend on it. Everywhere here, `kernels` is that key.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.engine.cpu.blocked_loss import blocked_cross_entropy, blocked_embedding
from rayexp.engine.cpu.memory import keep_freed_memory
from rayexp.engine.cpu.pooling import pool_before_relu
from rayexp.engine.cpu.shardwise import can_keep_apart, keep_gradients_apart
from rayexp.engine.cpu.small_map import SmallMapConvolution, use_small_map_convolutions
from rayexp.engine.rng import Draws


def save_page_faults(kernels: bool) -> None:
    """Settings of this process, made once before training."""
    if kernels:
        keep_freed_memory()


def together(model: nn.Module, kernels: bool) -> bool:
    """Whether several shards can go through this model in one pass (on a CPU, fp32)."""
    return kernels and can_keep_apart(model)


def accelerate(
    model: nn.Module, draws: Draws, together: bool, device: torch.device, kernels: bool
) -> Sequence[SmallMapConvolution]:
    """Speed up the forward and backward pass of a replica's module.

    Args:
        draws: tells the sizes of the shards in a pass.
        together: whether several shards go through the model in one pass.
        device: where the module computes.
        kernels: false: leave it as it is.

    Returns:
        What must be told when a step begins and ends, since it keeps values that follow from the weights meanwhile.
    """
    if not kernels:
        return []
    pool_before_relu(model)
    if together:
        keep_gradients_apart(model, draws)
    return use_small_map_convolutions(model, draws if together else None) if device.type == "cpu" else []


def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kernels: bool) -> Tensor:
    """The cross-entropy of each token in nats, where the logits are hidden @ weight.T + bias: float32[tokens].

    Args:
        hidden: [tokens, features].
        weight: [words, features].
        bias: [words] or None.
        targets: int64[tokens].
        kernels: on a CPU, false: the whole logits at once, as always on a GPU.
    """
    if kernels and not hidden.is_cuda:
        losses: Tensor = blocked_cross_entropy(hidden, weight, bias, targets)
        return losses
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")


def embedding(tokens: Tensor, weight: Tensor, kernels: bool) -> Tensor:
    """`F.embedding`: [..., size] from int64[...] and [words, size]."""
    if kernels and torch.is_grad_enabled() and not weight.is_cuda:
        vectors: Tensor = blocked_embedding(tokens, weight)
        return vectors
    return F.embedding(tokens, weight)
