"""What MLflow has stored, read back from a local store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow", reason="the extra rayexp[mlflow] is not installed")
pytest.importorskip("alembic", reason="the extra rayexp[mlflow] is not installed")

from mlflow import MlflowClient

from rayexp.config import ExperimentConfig
from rayexp.runs.run import Run
from rayexp.runs.trackers.tracker import recall
from rayexp.runs.writer import RunWriter

pytestmark = pytest.mark.slow  # making the store's tables takes seconds


def test_a_run_and_its_resume_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: Any) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("rayexp.runs.trackers.background.END_S", 300)
    monkeypatch.chdir(tmp_path)
    run = Run.create(ExperimentConfig(storage_path=tmp_path / "runs", tracking=("mlflow",)), argv=[])
    writer = epochs.begun(run)
    assert writer.plot_steps(1, [4.0, 3.0], [0.1, None]) == []
    epochs.add(writer, 1)
    writer.end("stopped")
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    name = recall(run, "mlflow")["run_id"]
    assert client.get_run(name).info.status == "KILLED"

    with monkeypatch.context() as killed:
        killed.setattr(RunWriter, "_plot", lambda *_: None)
        epochs.add(RunWriter(run), 2, 1 / 2)  # an epoch of which it was not told
    writer = epochs.begun(run)
    writer.plot_steps(2, [3.0, 2.0], [0.1, 0.2])  # step 2 once more
    epochs.add(writer, 3, 1 / 3)
    writer.end("done")
    stored = client.get_run(name)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == run.id
    assert stored.data.params["run"] == run.id
    assert stored.data.params["optimizer.name"] == "sgd"
    assert stored.data.tags["rayexp.run"] == run.id

    def curve(metric: str) -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in client.get_metric_history(name, metric))

    assert curve("loss/val") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert curve("step/loss") == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert curve("step/lr") == [(1, 0.1), (3, 0.2)]
    assert {file.path for file in client.list_artifacts(name)} == {"config.yaml", "metrics.csv"}
    assert stored.info.artifact_uri.startswith((tmp_path / "runs" / "mlartifacts").as_uri())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]  # nothing in the working directory
    assert "warnings" not in run.meta()


def test_a_server_that_is_not_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = Run.create(ExperimentConfig(storage_path=tmp_path, tracking=("mlflow",)), argv=[])
    writer = epochs.begun(run)
    epochs.add(writer, 1)
    writer.end("done")
    (warning,) = run.meta()["warnings"]
    assert warning.startswith("tracking: mlflow: MlflowException: ")
    assert run.status() == "done"
