"""Adaptive average pooling whose gradient a GPU adds up in one order.

CUDA's own kernel for that gradient adds by atomic operations unless the output is a single pixel, and where
deterministic algorithms are asked for, PyTorch refuses it. AlexNet and VGG pool so (to 6x6 and 7x7).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

POOLS = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}
"""The modules, and how many dimensions each pools."""
_FORWARDS = {kind: kind.forward for kind in POOLS}


def average(x: Tensor, output: Sequence[int | None]) -> Tensor:
    """The mean over windows, dimension by dimension: output i is that of the elements floor(i * size / output) to
    ceil((i + 1) * size / output), as torch.nn.AdaptiveAvgPool2d has it.

    Args:
        x: [..., sizes]; pooled over as many dimensions as `output` is long, the last ones.
        output: their new sizes; None: as it is.

    Returns:
        [..., output] in the dtype of `x`; added up in float32 at least.
    """
    found = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    for dim, size in enumerate(output, -len(output)):
        if size is not None and size != x.shape[dim]:
            weights = _windows(x.shape[dim], size, found)
            found = (found.unsqueeze(dim - 1) * weights.view(*weights.shape, *[1] * (-dim - 1))).sum(dim)
    return found.to(x.dtype)


def _windows(size: int, output: int, like: Tensor) -> Tensor:
    """Which elements belong to which window, each row with a sum of 1: [output, size]."""
    at, window = (torch.arange(count, device=like.device) for count in (size, output))
    start, stop = window * size // output, -(-(window + 1) * size // output)
    inside = (at >= start[:, None]) & (at < stop[:, None])
    return inside.to(like.dtype) / (stop - start)[:, None]


def add_in_order(model: nn.Module) -> None:
    """Have a replica's adaptive average pools computed by `average`, but those to a single pixel, which are a mean."""
    for module in model.modules():
        for kind, dims in POOLS.items():
            if isinstance(module, kind) and type(module).forward is _FORWARDS[kind]:
                given = module.output_size
                output = tuple(given) if isinstance(given, Sequence) else (given,) * dims
                if set(output) != {1}:
                    module.forward = functools.partial(average, output=output)
