"""The table of workloads. A further one is one file here, one line in the table, and one YAML in configs/."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rayexp.config.components import WORKLOADS

if TYPE_CHECKING:
    from rayexp.config import ExperimentConfig
    from rayexp.engine.workload import Workload


def open_workload(config: ExperimentConfig) -> Workload:
    """The workload that a configuration names, its data opened and its options checked (UserError)."""
    module, _, name = WORKLOADS[config.workload].partition(":")
    workload: Workload = getattr(importlib.import_module(module), name)(config)
    return workload
