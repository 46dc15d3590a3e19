"""One attempt on Ray: a TorchTrainer from start to end, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import tempfile
import threading
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.runtime_context import RuntimeContext
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from rayexp.errors import RunError, UserError
from rayexp.launch.faults import LostError
from rayexp.launch.job import WorkerJob
from rayexp.launch.on_ray.rendezvous import Meeting
from rayexp.launch.on_ray.session import environment, replaced
from rayexp.launch.on_ray.train_worker import member
from rayexp.launch.placement import Placement

# Ray Train polls its workers this often: a lost worker is seen by a poll, and a poll takes time from the worker.
POLL_S = 0.5
# A worker that does not answer for so long (stopped, or its host is) is replaced.
SILENCE_S = 120

_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(SILENCE_S),
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class RayTrainer(TorchTrainer):
    """A TorchTrainer that starts no processes but its workers; each other costs a second of a core at the start, and
    wakes a hundred times a second beside the workers.

    The controller runs in the calling thread, not in an actor. Workers have nobody to agree with on a report, because
    they write to the run directory. Left out by name, so that a Ray without them is no trouble: the manager of Ray
    Data's datasets, and in a driver, whose end frees what it holds, the cleaner. (A trial of Ray Tune needs it: killed,
    it would keep its places.)
    """

    def _create_default_callbacks(self) -> list[Any]:
        out = {"DatasetsCallback"} | (set() if _in_actor() else {"PlacementGroupCleanerCallback"})
        made: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [c for c in made if type(c).__name__ not in out]

    def _initialize_and_run_controller(self, **words: Any) -> Any:
        words["scaling_policy"] = Fixed(self.scaling_config)  # type: ignore[arg-type]
        with (
            replaced(worker_group, SynchronizationActor=_Nobody),
            replaced(state, _shutdown_sync_actor=lambda nobody: None),
            contextlib.nullcontext() if _in_actor() else replaced(RuntimeContext, current_actor=None),
        ):
            controller = TrainController(**words)
            asyncio.run(controller.run())  # type: ignore[no-untyped-call]
            return controller.get_result()


class Fixed(FixedScalingPolicy):
    """A fixed number of workers, for which no cluster is asked to grow: `autoscale` has done that."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing to register with."""

    def _maybe_send_resource_request(self) -> None:
        pass


class _Nobody:
    """Stands for the actor through which Ray Train's workers agree on a report."""

    @classmethod
    def options(cls, **words: Any) -> type[_Nobody]:
        return cls

    @classmethod
    def remote(cls, **words: Any) -> _Nobody:
        return cls()


def _in_actor() -> bool:
    return ray.get_runtime_context().get_actor_id() is not None


def fit(job: WorkerJob, plan: Placement, books: str) -> str:
    """Run the workers once; returns `done` or `stopped`.

    Args:
        job: what the workers train.
        plan: how many workers, and what each holds.
        books: a folder for what Ray Train writes of its own; the run directory is the truth.

    Raises:
        UserError, RunError: as a worker raised it.
        LostError: workers were lost or could not be placed in time.
    """
    resources = {"CPU": plan.cpus or 1.0} | ({"GPU": plan.gpus} if plan.gpu else {})
    with environment(_ENVIRONMENT):
        trainer = RayTrainer(
            member,  # type: ignore[arg-type]
            train_loop_config=job.to_json(),
            torch_config=Meeting(),  # type: ignore[arg-type]
            scaling_config=ScalingConfig(
                num_workers=plan.workers, use_gpu=plan.gpu, resources_per_worker=resources, placement_strategy="PACK"
            ),
            run_config=RunConfig(  # type: ignore[arg-type]
                name="fit",
                storage_path=books,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        try:
            return str(trainer.fit().return_value)  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            raise _cause(error) from error
        except RayError as error:
            raise LostError(f"Ray does not answer ({_line(error)})") from error


def _cause(error: TrainingFailedError) -> Exception:
    """What a worker raised, or LostError."""
    if isinstance(error, WorkerGroupError):
        failures = [(rank, getattr(e, "_base_exc", e)) for rank, e in sorted(error.worker_failures.items())]
        dead = [(rank, e) for rank, e in failures if not isinstance(e, UserError | RunError | LostError)]
        for kind in (UserError, RunError):
            for _, failure in failures:
                # Whatever others ran into, a worker that is gone is the reason.
                if isinstance(failure, kind) and (kind is UserError or not dead):
                    return kind(failure.fault, failure.advice)
        return LostError("; ".join(f"rank {rank}: {_fate(e)}" for rank, e in dead or failures))
    if isinstance(error, ControllerError):
        return LostError(_no_start(error.controller_failure))
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
        return "its node is gone" if "node" in str(inner).lower() and "died" in str(inner) else "its process is gone"
    return _line(inner)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


class Attempt(threading.Thread):
    """`fit` in a thread, so that the main thread keeps the screen and the signals."""

    def __init__(self, job: WorkerJob, plan: Placement) -> None:
        super().__init__(name="fit", daemon=True)
        self.job, self.plan = job, plan
        self.books = tempfile.mkdtemp(prefix="rayexp-")
        self.status = ""
        self.error: BaseException | None = None

    def run(self) -> None:
        """See threading.Thread."""
        try:
            self.status = fit(self.job, self.plan, self.books)
        except BaseException as error:
            self.error = error

    def close(self) -> None:
        """Remove the attempt's books; it may hang in a Ray that is gone."""
        shutil.rmtree(self.books, ignore_errors=True)
