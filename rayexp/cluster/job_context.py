"""What a process knows of the cluster job that it runs in: the job's id, and what relative paths mean there."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rayexp.cluster.home import fallback_home, user_home
from rayexp.config import ExperimentConfig
from rayexp.errors import UserError


def job_id() -> str | None:
    """The id under which this process was submitted to a cluster; None outside a job."""
    try:
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return None


def resolve_path(path: Path) -> Path:
    """In a job, a relative path counts from the home directory, because Ray deletes a job's working directory.

    Raises:
        UserError: there is no home directory that lasts.
    """
    if job_id() is None or path.is_absolute():
        return path
    home = user_home()
    if home in (None, fallback_home()):
        raise UserError(
            f"{path}: a job's relative paths count from the home directory, and this user has none; set HOME"
        )
    return home / path.expanduser()


def resolve_paths(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with every path resolved by `resolve_path`; data that came with the job is used where it is."""
    if job_id() is None:
        return config
    root = config.data.root
    if root is not None and not root.expanduser().exists():
        root = resolve_path(root)
    data = config.data.model_copy(update={"root": root})
    return config.model_copy(update={"data": data, "storage_path": resolve_path(config.storage_path)})
