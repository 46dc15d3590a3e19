"""Where a model is tried: a configuration with two tiny shards, and what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass

from rayexp.config import ExperimentConfig
from rayexp.engine.gradients import Master, ParameterLayout
from rayexp.engine.inputs import StepInputs
from rayexp.engine.runtime import Runtime, upload
from rayexp.engine.workload import Workload

SHARDS = range(2)
MOST = 4
"""Samples of a shard, at most: enough for a batch norm, and few enough for seconds."""


def small(config: ExperimentConfig, each: int = MOST) -> ExperimentConfig:
    """The configuration with two shards of at most `each` samples, in this process."""
    size = min(each, config.batch_size // config.shards)
    scaling = config.scaling.model_copy(update={"num_workers": 0, "lanes": 1})
    changes = {"batch_size": len(SHARDS) * size, "shards": len(SHARDS), "scaling": scaling, "compile": False}
    return config.model_copy(update=changes)


@dataclass(frozen=True)
class Setting:
    """What passes are made with.

    Attributes:
        config: from `small`.
        workload: of that configuration.
        runtime: where to compute.
    """

    config: ExperimentConfig
    workload: Workload
    runtime: Runtime

    def inputs(self) -> StepInputs:
        """What the first step of such a run is told."""
        device = self.runtime.device
        fed = {name: upload(array, device) for name, array in self.workload.feed(1, 0, SHARDS).items()}
        inputs = StepInputs(SHARDS, self.workload.sizes(0, SHARDS), device, self.workload.batch_dim, static=False)
        inputs.tell(fed, self.config.lr, 0, False, False)
        return inputs

    def master(self) -> Master:
        """Freshly initialised weights, with the layout of a run."""
        model = self.workload.model()
        layout = ParameterLayout(model, len(SHARDS), self.config.optimizer.decay_norm_and_bias)
        half = self.runtime.static and self.config.precision == "bf16"
        master = Master(model, layout, self.runtime.device, half)
        master.round_weights()
        return master
