"""Matrix products on the CPU through oneDNN.

PyTorch sends fp32 products to MKL, which on processors that are not Intel's uses half of the vector width; oneDNN's
generated kernels do not care who made the processor. Measured in benchmarks/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _find() -> bool:
    try:
        probe = torch.ops.mkldnn._linear_pointwise(torch.ones(1, 1), torch.ones(1, 1), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return bool(probe.item() == 1)


_FOUND: bool | None = None


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T (+ bias[n]) for fp32[m, k] and fp32[n, k], without gradient; fp32[m, n]. Other dtypes and devices as
    PyTorch does."""
    global _FOUND
    if a.dtype != torch.float32 or b.dtype != torch.float32 or a.is_cuda or b.is_cuda:
        return a @ b.t() if bias is None else torch.addmm(bias, a, b.t())
    if _FOUND is None:
        _FOUND = _find()
    if not _FOUND:
        return a @ b.t() if bias is None else torch.addmm(bias, a, b.t())
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return out
