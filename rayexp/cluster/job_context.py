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
    """The configuration with every path resolved by `resolve_path`; data and weights that came with the job are used
    where they are, and weights without a folder are the name of a run or of torchvision's."""
    if job_id() is None:
        return config
    root = config.data.root
    if root is not None and not root.expanduser().exists():
        root = resolve_path(root)
    data = config.data.model_copy(update={"root": root})
    model, text = config.model, config.model.weights
    if text is not None and len(Path(text).parts) > 1 and not Path(text).expanduser().exists():
        model = model.model_copy(update={"weights": str(resolve_path(Path(text).expanduser()))})
    return config.model_copy(update={"data": data, "model": model, "storage_path": resolve_path(config.storage_path)})
