"""Matrix products on the CPU by oneDNN or MKL, whichever is faster (measured in benchmarks/README.md).

PyTorch sends fp32 products to MKL, which uses only half of an AVX-512 unit on processors that are not Intel's; oneDNN
generates its kernels for any maker. With AVX2 there is nothing to halve and MKL is faster, since oneDNN rearranges its
second operand in every call.

`mkldnn._linear_pointwise` has no public name. The public way to oneDNN's product is a tensor in its own layout
(`Tensor.to_mkldnn`), which copies both operands. Where the operator is missing, PyTorch's product is used.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T (+ bias fp32[n]) for fp32[m, k] and fp32[n, k], without gradient: fp32[m, n]. Other dtypes and devices go
    to PyTorch's product."""
    return onednn(a, b, bias) if _avx512() else _pytorchs(a, b, bias)


def onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` by oneDNN on every processor: faster where `b` has few rows and `a` is a large matrix."""
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
    """Part of the fingerprint (engine/fingerprint.py), since the bits depend on it."""
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512")
