"""Matrix products on the CPU: oneDNN's or MKL's, whichever is the faster.

PyTorch sends fp32 products to MKL, which on processors that are not Intel's uses half of an AVX-512 unit; oneDNN's
generated kernels do not care who made the processor. With AVX2 there is nothing to halve, and MKL is faster: oneDNN
rearranges its second operand in every call. Measured in benchmarks/README.md.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T (+ bias[n]) for fp32[m, k] and fp32[n, k], without gradient; fp32[m, n]. Other dtypes and devices as
    PyTorch does."""
    return onednn(a, b, bias) if _avx512() else _pytorchs(a, b, bias)


def onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` by oneDNN on every processor: better where few rows meet a large matrix."""
    if a.dtype == b.dtype == torch.float32 and not a.is_cuda and not b.is_cuda and _found():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return out
    return _pytorchs(a, b, bias)


def _pytorchs(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a @ b.t() if bias is None else torch.addmm(bias, a, b.t())


@functools.cache
def _found() -> bool:
    try:
        probe = torch.ops.mkldnn._linear_pointwise(torch.ones(1, 1), torch.ones(1, 1), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return bool(probe.item() == 1)


@functools.cache
def _avx512() -> bool:
    """A part of the fingerprint (see engine/place.py): another answer may give other bits."""
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512")
