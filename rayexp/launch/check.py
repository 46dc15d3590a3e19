"""`rayexp check`: the contract check of a configuration, in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayexp import workloads
from rayexp.cluster.job_context import resolve_paths
from rayexp.config import ExperimentConfig
from rayexp.launch import starting
from rayexp.launch.local import on_gpu

if TYPE_CHECKING:
    from rayexp.engine.contract.breach import Contract


def check(config: ExperimentConfig) -> Contract:
    """Try a configuration's model on a few samples, in this process, and name all that breaks a promise.

    The model is the one that training begins with: with `model.weights`, and frozen as `model.freeze` says. Nothing is
    trained or written, and the generators and settings of this process are left as they were.

    Raises:
        UserError: the configuration, the data, the weights or the machine does not allow it.
        RunError: the weights are a checkpoint that is damaged.
    """
    from rayexp.engine import runtime
    from rayexp.engine.contract import check as trying
    from rayexp.engine.contract.setting import SHARDS

    config = starting.resolved(resolve_paths(config).absolute())
    weights = starting.read(config)
    alone = config.model_copy(update={"scaling": config.scaling.model_copy(update={"num_workers": 0, "lanes": 1})})
    device = runtime.device("cuda" if on_gpu(alone) else "cpu")
    with runtime.configure(alone, device, len(SHARDS)) as configured:
        if alone.precision == "auto":
            decided = "bf16" if device.type == "cuda" and configured.has_bf16() else "fp32"
            alone = alone.model_copy(update={"precision": decided})
        return trying.check(
            alone,
            workloads.open_workload,
            configured,
            lambda workload: weights.tensors(workload.describe().get("vocabulary")) if weights else {},
        )
