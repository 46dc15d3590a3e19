"""The workloads. A further one is one file, yours or in a folder here: a class that follows the protocol of
engine/workload.py, most easily a child of SampleWorkload (samples.py). `workload: ./file.py:Name` names it; one that is
to have a short name has a line in the table of config/components.py."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any, cast

from rayexp.config.components import WORKLOADS, parts_of
from rayexp.config.references import call, load_component
from rayexp.errors import UserError

if TYPE_CHECKING:
    from rayexp.config import ExperimentConfig
    from rayexp.engine.workload import Workload

WHERE = "(docs/your-own-model.md)"
# What has no default, and what run.json and the screen say.
REQUIRED = (
    *("unit", "kind", "goals", "batch_unit", "batch_dim", "shares_buffer", "together"),
    *("model", "steps", "batch", "feed", "assemble", "resident_bytes", "resident", "sizes", "initial_state", "loss"),
    *("touched_rows", "val_streams", "predict", "predictions", "metrics", "describe", "example"),
)


def workload_class(config: ExperimentConfig) -> type[Workload]:
    """The class of the workload that a configuration names; its `unit`, `kind` and `goals` are known without data.

    Raises:
        UserError: it cannot be imported, or is no workload.
    """
    name = config.workload
    if name in WORKLOADS:
        module, inner = parts_of(WORKLOADS[name])
        shipped: type[Workload] = getattr(importlib.import_module(module), inner)
        return shipped
    kind: Any = load_component("workload", name, config.code)
    if not inspect.isclass(kind):
        raise UserError(f"workload: {name} is a function; expected a class {WHERE}")
    if missing := [each for each in REQUIRED if not hasattr(kind, each)]:
        raise UserError(f"workload: {name} lacks {', '.join(missing)}; a child of SampleWorkload has them {WHERE}")
    own = cast("type[Workload]", kind)
    if own.kind not in ("images", "tokens", "samples"):
        raise UserError(f"workload: {name}.kind is {own.kind!r}; allowed: images, tokens, samples")
    if wrong := [goal for goal in dict(own.goals).values() if goal not in ("max", "min")]:
        raise UserError(f"workload: {name}.goals has {wrong[0]!r}; allowed: max, min")
    return own


def open_workload(config: ExperimentConfig, data: Any = None) -> Workload:
    """The workload that a configuration names, with its data opened and its options checked.

    Args:
        config: what to train.
        data: ImageData or TextData to take instead of opening the configuration's own.

    Raises:
        UserError: the configuration or the data does not fit.
    """
    kind = workload_class(config)
    given = (config,) if data is None else (config, data)
    if config.workload in WORKLOADS:
        return kind(*given)
    made: Workload = call("workload", config.workload, lambda: kind(*given), {}, config.code)
    return made
