"""Products of matrices, whoever computes them."""

from __future__ import annotations

import torch

from rayexp.engine.cpu.matmul import product


def test_product_is_the_product() -> None:
    a, b = torch.randn(7, 33), torch.randn(5, 33)
    assert torch.allclose(product(a, b), a @ b.t(), atol=1e-5)
    assert torch.allclose(product(a.t().contiguous().t(), b), a @ b.t(), atol=1e-5)
    assert product(a.double(), b.double()).dtype == torch.float64
