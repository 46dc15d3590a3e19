"""The workloads. A further one is a folder here, a line in the table (config/components.py), and a YAML in configs/."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rayexp.config.components import WORKLOADS

if TYPE_CHECKING:
    from rayexp.config import ExperimentConfig
    from rayexp.engine.workload import Workload


def open_workload(config: ExperimentConfig, data: Any = None) -> Workload:
    """The workload that a configuration names, with its data opened and its options checked.

    Args:
        config: what to train.
        data: ImageData or TextData to take instead of opening the configuration's own.

    Raises:
        UserError: the configuration or the data does not fit.
    """
    kind: Any = workload_class(config)
    workload: Workload = kind(config) if data is None else kind(config, data)
    return workload


def workload_class(config: ExperimentConfig) -> type[Workload]:
    """The class of the workload that a configuration names."""
    module, _, name = WORKLOADS[config.workload].partition(":")
    kind: type[Workload] = getattr(importlib.import_module(module), name)
    return kind
