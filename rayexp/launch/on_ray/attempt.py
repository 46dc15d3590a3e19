"""One attempt on Ray: a TorchTrainer from start to end, and what came of it."""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
import threading
from typing import Any

import ray.train
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import (
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from rayexp.errors import RunError, UserError
from rayexp.launch.faults import LostError
from rayexp.launch.job import WorkerJob
from rayexp.launch.on_ray.session import environment
from rayexp.launch.on_ray.train_worker import train_loop
from rayexp.launch.placement import Placement
from rayexp.launch.worker_fault import find
from rayexp.runs.run import Run

# Ray Train polls its workers this often: a lost worker is seen by a poll, and an epoch's report waits for the one
# before it to be fetched by a poll.
POLL_S = 0.25
# A worker that does not answer for so long (stopped, or its host is) is replaced.
SILENCE_S = 120

_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(SILENCE_S),
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class PreemptedError(LostError):
    """Workers were lost because their node was taken away, which had been announced."""


def fit(job: WorkerJob, plan: Placement, storage: str) -> None:
    """Run the workers once, to their end; run.json says whether the run is done or was stopped.

    Args:
        job: what the workers train.
        plan: how many workers, and what each holds.
        storage: a folder for what Ray Train writes of its own; the run directory is the truth.

    Raises:
        UserError, RunError: as a worker raised it.
        LostError: workers were lost or could not be placed in time.
    """
    resources = {"CPU": plan.cpus or 1.0} | ({"GPU": plan.gpus} if plan.gpu else {})
    with environment(_ENVIRONMENT):
        trainer = TorchTrainer(
            train_loop,
            train_loop_config=job.to_json(),
            torch_config=TorchConfig(backend="gloo", timeout_s=round(job.timeout_s)),
            scaling_config=ScalingConfig(
                num_workers=plan.workers, use_gpu=plan.gpu, resources_per_worker=resources, placement_strategy="PACK"
            ),
            run_config=RunConfig(
                name="attempt",
                storage_path=storage,
                failure_config=_no_retries(),
                checkpoint_config=CheckpointConfig(num_to_keep=None),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error
        except RayError as error:
            raise LostError(f"Ray does not answer ({_line(error)})") from error


def _no_retries() -> FailureConfig:
    """Ray Train tries nothing again: `supervise` does, and knows what to resume from."""
    limits: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": 0, "max_preemption_failures": 0}
    known = {field.name for field in dataclasses.fields(FailureConfig)}
    return FailureConfig(**{name: limit for name, limit in limits.items() if name in known})


def _cause(error: TrainingFailedError) -> Exception:
    """What a worker raised, or LostError."""
    if isinstance(error, WorkerGroupError):
        failures = sorted(error.worker_failures.items())
        told = {rank: find(str(failure)) for rank, failure in failures}
        dead = [(rank, failure) for rank, failure in failures if told[rank] is None]
        for kind in (UserError, RunError):
            for found in told.values():
                # Whatever others ran into, a worker that is gone is the reason.
                if isinstance(found, kind) and (kind is UserError or not dead):
                    return found
        if dead:
            return LostError("; ".join(f"rank {rank}: {_fate(failure)}" for rank, failure in dead))
        return LostError("; ".join(f"rank {rank}: {found}" for rank, found in told.items()))
    if isinstance(error, ControllerError):
        return LostError(_no_start(error.controller_failure))
    preempted = getattr(ray.train, "PreemptionError", None)  # since Ray 2.60
    if preempted is not None and isinstance(error, preempted):
        return PreemptedError("their node was taken away")
    return LostError(_line(error))


def _no_start(error: BaseException) -> str:
    """Where a worker could not be started, and why: both stand somewhere in a long text of Ray's, the cause last."""
    text = str(error)
    hosts = dict.fromkeys(re.findall(r"\bip[=:] ?([^\s,)]+)", text))
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("The actor never ran")]
    cause = lines[-1] if lines else type(error).__name__
    where = f" on {', '.join(hosts)}" if hosts else ""
    return f"a worker could not be started{where}: {' '.join(cause.split())[:300]}"


def _fate(error: BaseException) -> str:
    """How a worker was lost, briefly."""
    inner = getattr(error, "health_check_failure", error)  # what a health check met with
    if isinstance(inner, OutOfMemoryError):
        return "killed because its node ran out of memory"
    if isinstance(inner, RayActorError):
        return "its node is gone" if "its node has died" in str(inner) else "its process is gone"
    return _line(inner)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


class Attempt(threading.Thread):
    """`fit` in a thread, so that the main thread keeps the screen and the signals.

    Attributes:
        status: `done` or `stopped`; empty while it runs and where it failed.
        error: why it failed.
    """

    def __init__(self, job: WorkerJob, plan: Placement) -> None:
        super().__init__(name="attempt", daemon=True)
        self.job, self.plan = job, plan
        self.storage = tempfile.mkdtemp(prefix="rayexp-")
        self.status = ""
        self.error: BaseException | None = None

    def run(self) -> None:
        """See threading.Thread."""
        try:
            fit(self.job, self.plan, self.storage)
            self.status = str(Run(self.job.run).meta()["status"])
        except BaseException as error:
            self.error = error

    def close(self) -> None:
        """Remove the attempt's storage; it may hang in a Ray that is gone."""
        shutil.rmtree(self.storage, ignore_errors=True)
