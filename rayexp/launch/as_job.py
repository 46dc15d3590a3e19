"""What a run has to know where it is a job of a cluster. Knows no Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rayexp.config import ExperimentConfig


def job_id() -> str | None:
    """The id under which this process was submitted to a cluster, or None where it is no job."""
    try:
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return None


def at_home(config: ExperimentConfig) -> ExperimentConfig:
    """In a job, relative paths count from the home directory: Ray throws a job's working directory away.

    Data that travelled in the working directory is found there first.
    """
    if job_id() is None:
        return config
    root = config.data.root
    if root is not None and not root.expanduser().exists():
        root = Path.home() / root
    data = config.data.model_copy(update={"root": root})
    storage = Path.home() / config.storage_path.expanduser()
    return config.model_copy(update={"data": data, "storage_path": storage})
