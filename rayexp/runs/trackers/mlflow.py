"""MLflow: a run of its own for every run, in MLFLOW_TRACKING_URI or a local store beside the run directories."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from rayexp.runs.metrics_csv import FILE
from rayexp.runs.run import Run
from rayexp.runs.trackers.tracker import Axis, environment, parameters, recall, remember

EXPERIMENT = "rayexp"
STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
# What one request may hold, and how long a value may be (mlflow.utils.validation).
PARAMETERS, METRICS, LENGTH = 100, 1000, 6000


class Mlflow:
    """Tells an MLflow store of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        place = environment(run, "mlflow")
        uri = place.get("MLFLOW_TRACKING_URI")
        self.experiment = place.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        # Of a store of its own artifacts would go to the working directory.
        self.artifacts = None if uri else (run.root.parent / "mlartifacts").as_uri()
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of making the tables
        self.client = MlflowClient(uri or f"sqlite:///{run.root.parent / 'mlflow.db'}")
        self.id = ""

    def begin(self) -> None:
        """See Service."""
        known = recall(self.run, "mlflow").get("run_id")
        if known:
            self.id = str(known)
            self.client.update_run(self.id, status="RUNNING")
            remember(self.run, "mlflow", under_way=True)
            return
        created = self.client.create_run(self._experiment(), run_name=self.run.id)
        self.id = created.info.run_id
        remember(self.run, "mlflow", run_id=self.id, experiment_id=created.info.experiment_id, under_way=True)
        self.client.log_batch(self.id, tags=[RunTag("rayexp.run", self.run.id)])
        named = [Param(key, value[:LENGTH]) for key, value in parameters(self.run).items()]
        for start in range(0, len(named), PARAMETERS):
            self.client.log_batch(self.id, params=named[start : start + PARAMETERS])

    def log(self, rows: Sequence[tuple[int, Mapping[str, float]]], axis: Axis) -> None:
        """See Service."""
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, number) for number, values in rows for name, value in values.items()]
        for start in range(0, len(metrics), METRICS):
            self.client.log_batch(self.id, metrics=metrics[start : start + METRICS])

    def end(self, status: str) -> None:
        """See Service; the configuration and metrics.csv become artifacts."""
        for path in (self.run.config_path, self.run.root / FILE):
            if path.is_file():
                self.client.log_artifact(self.id, str(path))
        self.client.set_terminated(self.id, STATUS[status])
        remember(self.run, "mlflow", under_way=False)

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        return str(self.client.create_experiment(self.experiment, self.artifacts))
