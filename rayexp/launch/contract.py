"""The contract check before the first step of a model or workload that is not shipped."""

from __future__ import annotations

import json
from typing import Any

from rayexp import workloads
from rayexp.config import ExperimentConfig
from rayexp.engine.contract.check import check, is_shipped
from rayexp.engine.group import WorkerGroup
from rayexp.engine.runtime import Runtime
from rayexp.engine.workload import Workload
from rayexp.errors import UserError


def before_training(
    config: ExperimentConfig, workload: Workload, model: Any, group: WorkerGroup, runtime: Runtime
) -> list[str]:
    """Refuse a model or a workload of the user's own that breaks a promise; every worker must call it, and rank 0
    checks.

    Returns:
        A line for each thing that is not refused, and that somebody should know.

    Raises:
        UserError: it names what is refused first.
    """
    if is_shipped(config, workload, model):
        return []
    told: dict[str, list[str]] = {}
    if group.rank == 0:
        contract = check(config, workloads.open_workload, runtime)
        told = {"refused": list(map(str, contract.refused)), "warnings": list(map(str, contract.warnings))}
    told = json.loads(group.broadcast(json.dumps(told).encode()))
    if refused := told["refused"]:
        more = f"; and {len(refused) - 1} more, which `rayexp check CONFIG` lists" if len(refused) > 1 else ""
        raise UserError(refused[0], more)
    return told["warnings"]
