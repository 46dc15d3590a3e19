"""Whether a GPU keeps the samples in its memory (`data.resident`)."""

from __future__ import annotations

import torch

from rayexp.config import ExperimentConfig
from rayexp.engine.runtime import Runtime
from rayexp.engine.workload import Workload
from rayexp.runs.residency import Residency


def keep_samples(config: ExperimentConfig, workload: Workload, runtime: Runtime) -> Residency | None:
    """Let the workload keep its samples in the GPU's memory where it is to; None where there is nothing to keep: on a
    CPU, and with a workload that has little to send.

    Raises:
        torch.OutOfMemoryError: `data.resident` is true, and the memory is too small.
    """
    needed = workload.resident_bytes() if runtime.device.type == "cuda" else 0
    if not needed:
        return None
    asked, free = config.data.resident, runtime.free_memory()
    # Workers that share a GPU look at its memory at the same moment, before any of them has taken its part.
    share = min(1.0, config.scaling.gpus_per_worker) if config.scaling.num_workers != 0 else 1.0
    kept = needed < free * share / 2 if asked == "auto" else bool(asked)
    if kept:
        try:
            workload.resident(runtime.device)
        except torch.OutOfMemoryError:
            if asked is True:
                raise
            kept = False  # others were faster
    return Residency(kept, needed, free, asked)
