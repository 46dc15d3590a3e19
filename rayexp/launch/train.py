"""The driver: from a configuration to a finished run, in this process or on Ray.

The run directory is the truth. An attempt takes up the newest whole checkpoint there; whether another attempt follows,
and with how many workers, is decided here and not by Ray.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rayexp.clock import mark
from rayexp.config import ExperimentConfig
from rayexp.data import open_data
from rayexp.errors import UserError
from rayexp.integrity import FREE, changes, check_config
from rayexp.launch import plan as planning
from rayexp.launch.as_job import at_home, job_id
from rayexp.launch.plan import Plan
from rayexp.launch.screen import chatter_to, screen
from rayexp.launch.stopping import stoppable
from rayexp.locks import only_driver
from rayexp.manifest import state_fault
from rayexp.recorder import Recorder
from rayexp.runs import Run

if TYPE_CHECKING:
    from rich.console import Console

TIMEOUT_S = 300.0  # a worker that says nothing for so long counts as lost


def run(
    config: ExperimentConfig,
    *,
    argv: Sequence[str],
    resume: Run | None = None,
    address: str | None = None,
    console: Console | None = None,
    started: float | None = None,
    max_steps: int | None = None,
    trace: bool = False,
    parent: str | None = None,
) -> Run:
    """Train, and return the finished run.

    Args:
        config: what to train.
        argv: the command, for run.json.
        resume: go on with this run instead of making one.
        address: of a running Ray; None: RAY_ADDRESS, a Ray started here by `ray start`, else a new one.
        console: where progress is shown; None: nowhere.
        started: time.monotonic() at which the command began.
        max_steps: stop (and save) after that many steps of the whole run.
        trace: write the hashes of every step to trace.jsonl.
        parent: the id of the comparison this run belongs to.

    Raises:
        UserError: the configuration, the data or the machine does not allow it. A fresh run leaves nothing behind.
        RunError: the run failed; run.json says so.
        KeyboardInterrupt: it was asked to stop; the last whole step is saved and run.json says `stopped`.
    """
    began = mark(started)
    config = at_home(config).absolute()
    if resume is not None:
        check_unchanged(resume, config)
    made = resume or Run.create(config, argv=list(argv), parent=parent)
    with _driving(made, fresh=resume is None):
        if resume is not None:
            _reopen(made, config, argv)
        payload = {
            "run": str(made.root),
            "config": config.model_dump(mode="json"),
            "started": began,
            "max_steps": max_steps,
            "trace": trace,
            "measure_link": parent is not None,
            "timeout_s": TIMEOUT_S,
        }
        try:
            status = _supervise(made, config, payload, address, console)
        except KeyboardInterrupt:
            _finish(made, "stopped", "ended at once; the step that was under way is lost")
            raise
        except UserError as error:
            if resume is None and not made.epochs():
                shutil.rmtree(made.root)
            else:
                _finish(made, "failed", str(error))
            raise
        except BaseException as error:
            _finish(made, "failed", str(error) or type(error).__name__)
            raise
    if status == "stopped" and (max_steps is None or _steps_done(made) < max_steps):
        raise KeyboardInterrupt
    return made


@contextlib.contextmanager
def _driving(run: Run, fresh: bool) -> Iterator[None]:
    """`only_driver`; a directory that was just made does not stay where its lock cannot be had."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_driver(run.root))
        except UserError:
            if fresh:
                shutil.rmtree(run.root, ignore_errors=True)
            raise
        yield


def check_unchanged(run: Run, config: ExperimentConfig) -> None:
    """Refuse to resume under a configuration that would make another model (UserError names the changed keys), or where
    the run's own is no longer what it began with."""
    check_config(run)
    if changed := changes(run.config(), config):
        raise UserError(f"--resume {run.id}: the configuration has changed: {changed}; allowed: {', '.join(FREE)}")


def _reopen(run: Run, config: ExperimentConfig, argv: Sequence[str]) -> None:
    meta = run.meta()
    before = run.config()
    kept = config.model_copy(update={"name": before.name, "storage_path": before.storage_path})
    run.write(run.config_path.name, kept.to_yaml())
    resumed = [*meta.get("resumed", ()), {"argv": list(argv), "after": meta["status"]}]
    where = {"pid": os.getpid(), "host": socket.gethostname()}
    run.update(status="running", error=None, finished=None, resumed=resumed, **where)


def _finish(run: Run, status: str, error: str) -> None:
    """The last word where no worker could say it. Where it cannot be written, the run reads as died."""
    with contextlib.suppress(OSError):
        Recorder(run).end(status, error)


def _steps_done(run: Run) -> int:
    return max((state["step"] for path, state in run.resumable() if not state_fault(state, path.name)), default=0)


def outline(config: ExperimentConfig, address: str | None = None) -> dict[str, Any]:
    """What `run` would do, without doing it: workers, device, lanes, steps. Joins a Ray only where an address is given;
    else the plan is for this machine.

    Raises:
        UserError: as `run`.
    """
    from rayexp import workloads
    from rayexp.engine.place import lanes_of
    from rayexp.launch.local import here

    config = config.absolute()
    nodes = [here()]
    address = address or os.environ.get("RAY_ADDRESS")
    if address and config.scaling.num_workers != 0:
        from rayexp.launch.on_ray import session

        with session.session(address):
            nodes = session.nodes()
    plan = planning.make(config, nodes)
    workload = workloads.open_workload(config)
    steps, workers = workload.steps(), max(1, plan.workers)
    return {
        "where": "this process" if not plan.workers else f"Ray, {len(nodes)} node{'s' * (len(nodes) > 1)}",
        "workers": plan.workers,
        "device": "gpu" if plan.gpu else "cpu",
        "cpus_per_worker": plan.cpus,
        "gpus_per_worker": plan.gpus,
        "lanes_per_worker": 1 if plan.gpu else lanes_of(config, config.shards // workers, plan.cpus),
        "shards_per_worker": config.shards // workers,
        f"{workload.unit if workload.unit == 'images' else 'columns'}_per_worker": config.batch_size // workers,
        "steps_per_epoch": steps,
        "steps": steps * config.epochs,
    }


# ---------------------------------------------------------------------- attempts


def _supervise(
    run: Run, config: ExperimentConfig, payload: dict[str, Any], address: str | None, console: Console | None
) -> str:
    if config.scaling.num_workers == 0:
        from rayexp.launch.local import attempt, here

        if job_id():
            from rayexp.launch import sources
            from rayexp.launch.on_ray import session

            with session.session(address):
                sources.offer(run)
        plan = planning.make(config, [here()])
        with screen(run, console) as shown, stoppable(run, shown.say):
            return attempt(run, payload | _placed(plan))
    with chatter_to(run.logs / "ray.log", console), screen(run, console) as shown:
        shown.phase("starting Ray")
        # Its imports take as long as Ray itself.
        imports = threading.Thread(target=importlib.import_module, args=["rayexp.launch.on_ray.drive"], daemon=True)
        imports.start()
        from rayexp.launch.on_ray import session

        # In this order: Ray sets signal handlers of its own.
        with session.session(address) as own_ray, stoppable(run, shown.say) as stopped:
            if own_ray:
                open_data(config.data)  # so that what is missing here is said at once, and packed once
            imports.join()
            from rayexp.launch.on_ray.drive import drive

            shown.phase("starting workers")
            return drive(run, config, payload, _placed, shown, stopped, own_ray)


def _placed(plan: Plan) -> dict[str, Any]:
    return {
        "device": "cuda" if plan.gpu else "cpu",
        "cpus": plan.cpus,
        "shared_gpu": 0 < plan.gpus < 1,
        "nonce": secrets.token_hex(8),
    }
