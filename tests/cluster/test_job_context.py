"""What a process knows of the job that it runs in."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayexp.cluster import job_context
from rayexp.config import ExperimentConfig

pytestmark = pytest.mark.usefixtures("empty_home")


def test_relative_paths_of_a_job_count_from_home(
    empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExperimentConfig.model_validate({"data": {"name": "folder", "root": "pictures"}, "storage_path": "runs"})
    monkeypatch.chdir(tmp_path)
    assert job_context.resolve_paths(config) == config  # no job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "j1"}}')
    assert job_context.job_id() == "j1"
    assert job_context.resolve_paths(config).data.root == empty_home / "pictures"
    assert job_context.resolve_paths(config).storage_path == empty_home / "runs"
    (tmp_path / "pictures").mkdir()  # travelled with the job
    assert job_context.resolve_paths(config).absolute().data.root == tmp_path / "pictures"
    absolute = config.model_copy(update={"storage_path": Path("/nfs/runs")})
    assert job_context.resolve_paths(absolute).storage_path == Path("/nfs/runs")
