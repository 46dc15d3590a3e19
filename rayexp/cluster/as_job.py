"""What a run has to know where it is a job of a cluster. Knows no Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rayexp.cluster import surroundings
from rayexp.config import ExperimentConfig
from rayexp.errors import UserError


def job_id() -> str | None:
    """The id under which this process was submitted to a cluster, or None where it is no job."""
    try:
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return None


def below_home(path: Path) -> Path:
    """In a job, a relative path counts from the home directory: Ray throws a job's working directory away.

    Raises:
        UserError: there is no home directory that lasts.
    """
    if job_id() is None or path.is_absolute():
        return path
    home = surroundings.home()
    if home in (None, surroundings.stand_in()):
        raise UserError(
            f"{path}: a job's relative paths count from the home directory, and this user has none; set HOME"
        )
    return home / path.expanduser()


def at_home(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with `below_home`'s paths; data that came in the working directory is found there first."""
    if job_id() is None:
        return config
    root = config.data.root
    if root is not None and not root.expanduser().exists():
        root = below_home(root)
    data = config.data.model_copy(update={"root": root})
    return config.model_copy(update={"data": data, "storage_path": below_home(config.storage_path)})
