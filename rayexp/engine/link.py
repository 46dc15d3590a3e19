"""The speed of the link between workers: bare all-reductions, timed before training (for `rayexp compare`)."""

from __future__ import annotations

import statistics
import time

import torch

from rayexp.engine.group import WorkerGroup
from rayexp.engine.runtime import Runtime

SMALL = 64  # bytes


def measure(group: WorkerGroup, runtime: Runtime, size: int) -> dict[str, float]:
    """Time the sum over all workers of `size` bytes, and of a few bytes; every worker must call it.

    Returns:
        `bytes` and `seconds` (the median), `small_bytes` and `small_seconds`.
    """
    found: dict[str, float] = {}
    for name, many, times in (("", size, 5), ("small_", SMALL, 30)):
        tensor = torch.zeros(many // 4, device=runtime.device)
        spans = []
        for _ in range(times + 1):
            group.barrier()
            runtime.synchronize()
            start = time.perf_counter()
            group.sum(tensor)()
            runtime.synchronize()
            spans.append(time.perf_counter() - start)
        found |= {f"{name}bytes": tensor.numel() * 4, f"{name}seconds": statistics.median(spans[1:])}
    return found
