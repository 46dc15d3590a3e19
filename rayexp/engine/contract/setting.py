"""Where a model is tried: a configuration with two tiny shards, and what belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from rayexp.config import ExperimentConfig
from rayexp.engine.freezing import freeze
from rayexp.engine.gradients import Master, ParameterLayout
from rayexp.engine.inputs import StepInputs
from rayexp.engine.runtime import Runtime, upload
from rayexp.engine.starting import adopt
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
        weights: tensors to start from, by name (`model.weights`); empty: the model's own.
    """

    config: ExperimentConfig
    workload: Workload
    runtime: Runtime
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """A model as training begins with it: with the weights to start from, and frozen as `model.freeze` says.

        Raises:
            UserError: the weights do not fit, or a pattern matches no parameter.
        """
        model = self.workload.model()
        if self.weights:
            classes = len(self.workload.describe().get("classes", ())) or None
            adopt(model, self.weights, str(self.config.model.weights), classes)
        freeze(model, self.config.model)
        return model

    def inputs(self) -> StepInputs:
        """What the first step of such a run is told."""
        device = self.runtime.device
        fed = {name: upload(array, device) for name, array in self.workload.feed(1, 0, SHARDS).items()}
        inputs = StepInputs(SHARDS, self.workload.sizes(0, SHARDS), device, self.workload.batch_dim, static=False)
        inputs.tell(fed, self.config.lr, 0, False, False)
        return inputs

    def master(self) -> Master:
        """The weights that training begins with, in the layout of a run."""
        model = self.model()
        layout = ParameterLayout(model, len(SHARDS), self.config.optimizer.decay_norm_and_bias)
        half = self.runtime.static and self.config.precision == "bf16"
        master = Master(model, layout, self.runtime.device, half)
        master.round_weights()
        return master
