"""The driver takes a configuration to a finished run, in this process or on Ray.

The run directory is the only record of where a run stands: every attempt goes on from its newest whole checkpoint.
Whether another attempt follows, and with how many workers, is decided here, not by Ray.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rayexp.cluster.job_context import job_id, resolve_paths
from rayexp.config import UNDECIDED, ExperimentConfig, passed_over
from rayexp.config.code import FOLDER
from rayexp.config.components import WORKLOADS
from rayexp.data import open_data
from rayexp.display import counted
from rayexp.errors import HeadLostError, RunError, Stopped, UserError, last_words
from rayexp.launch import placement as planning
from rayexp.launch import starting
from rayexp.launch.callbacks import Listeners, listening
from rayexp.launch.job import WorkerJob
from rayexp.launch.placement import Placement
from rayexp.launch.resuming import go_on
from rayexp.launch.screen import chatter_to, screen, show
from rayexp.launch.stopping import Stopping, stoppable
from rayexp.runs.code import check_code
from rayexp.runs.code import kept as with_copy
from rayexp.runs.integrity import check_config, check_unchanged, is_finished
from rayexp.runs.manifest import state_fault
from rayexp.runs.run import Run
from rayexp.runs.trackers.opening import hand_on, refuse_missing
from rayexp.runs.writer import RunWriter
from rayexp.system.clock import mark
from rayexp.system.cores import cores
from rayexp.system.locks import Driver, only_driver

if TYPE_CHECKING:
    from rich.console import Console

TIMEOUT_S = 300.0  # a worker that sends nothing for so long counts as lost


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
    callbacks: Sequence[object] = (),
    guest: bool = False,
) -> Run:
    """Train, and return the finished run.

    Args:
        config: what to train.
        argv: the command, for run.json.
        resume: a run to go on with; None: make a new one. A finished one is returned as it is; with more `epochs`
            than it has, it is trained on.
        address: of a running Ray; None: RAY_ADDRESS, a Ray started here by `ray start`, else a new one.
        console: shows progress; None: nothing is shown.
        started: time.monotonic() at which the command began.
        max_steps: stop (and save) after that many steps of the whole run.
        trace: write the hashes of every step to trace.jsonl.
        parent: the id of the comparison this run belongs to.
        callbacks: objects that are told of steps and epochs, see launch/callbacks.py.
        guest: whether the process is another program's: its stdout and stderr stay where they are, and it is never
            ended from here.

    Raises:
        UserError: the configuration, the data or the machine does not allow it. A run that has not begun is removed;
            one that holds anything that training has made is kept.
        RunError: the run failed; run.json says so. Or a callback has raised an error: the last whole step is saved.
        Stopped: a signal asked it to stop; the last whole step is saved and run.json says `stopped`.
    """
    began = mark(started)
    config = resolve_paths(config).absolute()
    refuse_missing(config.tracking)
    if resume is None:
        config = starting.resolved(config)
    else:
        config = _as_begun(resume, config)
        check_unchanged(resume, config)
        check_code(resume.root, resume.meta(), config)
        if is_finished(resume, config):
            show(console, finished_line(resume, config))
            return resume
    weights = starting.read(config) if resume is None else None
    made = resume or Run.create(config, argv=list(argv), parent=parent)
    config = with_copy(made.root, config)
    with _driving(made, fresh=resume is None) as driver, stoppable(made) as stopping:
        undo = None if resume is None else _reopen(made, config, argv)

        def job(plan: Placement, nodes: int) -> WorkerJob:
            """The job of one attempt."""
            nonlocal config
            config = _decided(made, config, plan)
            return WorkerJob(
                run=made.root,
                config=config,
                device="cuda" if plan.gpu else "cpu",
                cpus=plan.cpus,
                started=began,
                max_steps=max_steps,
                trace=trace,
                measure_link=parent is not None,
                timeout_s=TIMEOUT_S,
                go_on=go_on(made.root),
                driver=driver.token,
                nonce=secrets.token_hex(8),
                nodes=nodes,
                shared_gpu=0 < plan.gpus < 1,
            )

        heard: Listeners | None = None
        try:
            hand_on(made, config.tracking)
            if weights is not None:
                weights.keep(made)
            with listening(made, callbacks, stopping.halt) as heard:
                status = _supervise(made, config, job, address, console, stopping, guest)
        except BaseException as error:
            if _status(made) == "done":
                return made  # a signal after the end of the run, or the end of its Ray, changes nothing
            _fail(made, error, stopping, resume is None, undo)
            if heard is not None and heard.failure is not None:
                raise _failed_callback(made, heard.failure, _status(made)) from heard.failure[1]
            if stopping() or isinstance(error, KeyboardInterrupt):
                number = stopping.number or int(getattr(error, "number", signal.SIGINT))
                raise _stopped(made, number, _own_fault(error)) from error
            if isinstance(error, UserError | HeadLostError) and _holds_work(made):
                raise type(error)(error, f"; {_saved(made)}") from error
            raise
        if heard.failure is not None:
            raise _failed_callback(made, heard.failure, status) from heard.failure[1]
    if status == "stopped" and (max_steps is None or _steps_done(made) < max_steps):
        raise _stopped(made, stopping.number or signal.SIGINT)
    return made


@contextlib.contextmanager
def _driving(run: Run, fresh: bool) -> Iterator[Driver]:
    """`only_driver`; where the lock cannot be taken, a directory that was just made is removed."""
    with contextlib.ExitStack() as stack:
        try:
            driver = stack.enter_context(only_driver(run.root))
        except UserError:
            if fresh:
                shutil.rmtree(run.root, ignore_errors=True)
            raise
        yield driver


def finished_line(run: Run, config: ExperimentConfig) -> str:
    """What is said where a finished run is resumed."""
    more = "" if config.schedule.depends_on_epochs else f"; epochs={config.epochs + 1} or more trains on"
    return f"{run.id} is done, {config.epochs} of {config.epochs} epochs: nothing to go on with{more}"


def _as_begun(run: Run, config: ExperimentConfig) -> ExperimentConfig:
    """The configuration of a resume, with what was decided when the run began and is not asked for now."""
    check_config(run)
    begun = run.config()
    decided = {key: getattr(begun, key) for key, open_ in UNDECIDED.items() if getattr(config, key) == open_}
    if decided.get("threads_per_shard", 1) is None and _holds_work(run):
        decided["threads_per_shard"] = 1  # it has trained on a GPU, or before there was this key
    return starting.as_begun(run, config.model_copy(update=decided))


def _decided(run: Run, config: ExperimentConfig, plan: Placement) -> ExperimentConfig:
    """The configuration with what its first attempt decides; config.yaml has it, too. (What the devices decide is up to
    the workers: launch/precision.py.)"""
    found = planning.with_threads(config, plan, cores())
    if found is config:
        return config
    kept = RunWriter(run).decide("threads_per_shard", found.threads_per_shard)
    return config.model_copy(update={"threads_per_shard": kept})


def _reopen(run: Run, config: ExperimentConfig, argv: Sequence[str]) -> Callable[[], bool]:
    """Begin another attempt at a run. Returns what takes that back, as long as nothing has been saved since, and tells
    whether it did: a resume that was refused leaves the run's status and configuration as they were."""
    meta, done, text = run.meta(), _steps_done(run), run.config_path.read_text(encoding="utf-8")
    before = run.config()
    kept = config.model_copy(update={"name": before.name, "storage_path": before.storage_path})
    resumed = [*meta.get("resumed", ()), {"argv": list(argv), "after": meta["status"]}]
    where = {"pid": os.getpid(), "host": socket.gethostname()}
    run.update(status="running", error=None, finished=None, resumed=resumed, **where)
    run.write(run.config_path.name, kept.to_yaml(FOLDER))  # after the status: a run that is done has all its epochs

    def undo() -> bool:
        if _steps_done(run) != done:
            return False
        with contextlib.suppress(OSError, UserError):  # as in _finish
            run.write(run.config_path.name, text)
            RunWriter(run).end("failed" if meta["status"] == "running" else meta["status"])
            run.update(**{"resumed": [], **{key: value for key, value in meta.items() if key != "files"}})
            return True
        return False

    return undo


def _fail(
    run: Run, error: BaseException, stopping: Stopping, fresh: bool, undo: Callable[[], bool] | None = None
) -> None:
    """Write the end of a run that no worker could write; a run that has not begun is removed, and one whose resume was
    refused is as it was."""
    if stopping() or isinstance(error, KeyboardInterrupt):
        if _status(run) != "stopped":
            begun = run.stepping()
            lost = "ended at once; the step that was under way is lost" if begun else "ended before its first step"
            _finish(run, "stopped", _own_fault(error) or lost)
    elif isinstance(error, UserError) and fresh and not _holds_work(run):
        shutil.rmtree(run.root)
    elif not (isinstance(error, UserError) and undo is not None and undo()):
        _finish(run, "failed", str(error) or type(error).__name__)


def _finish(run: Run, status: str, error: str) -> None:
    # What ended the run may prevent this, too (a full disk, a directory that is gone), and must not be hidden by it. A
    # run that says `running` and has no driver counts as one that died.
    with contextlib.suppress(OSError, UserError):
        RunWriter(run).end(status, error)


def _status(run: Run) -> str:
    try:
        return str(run.meta()["status"])
    except UserError:
        return ""


def _holds_work(run: Run) -> bool:
    """Whether the run holds anything that training has made: a checkpoint of any kind, whole or not, or an epoch."""
    kept = (run.checkpoints, run.predictions_path(1).parent)
    return run.epochs_path.exists() or any(folder.is_dir() and any(folder.iterdir()) for folder in kept)


def _own_fault(error: BaseException) -> str:
    """What went wrong in a run that was asked to stop; empty where the stop itself caused it: an interrupted call, or a
    Ray that the same signal has ended."""
    if isinstance(error, UserError | RunError) and not isinstance(error, HeadLostError):
        return error.fault
    return ""


def _stopped(run: Run, number: int, fault: str = "") -> Stopped:
    return Stopped(number, f"stopped; {fault + '; ' if fault else ''}{_saved(run)}")


def _failed_callback(run: Run, failure: tuple[str, BaseException], status: str) -> RunError:
    """A callback's error as that of the run, which has saved; run.json has it, too."""
    name, error = failure
    line = f"callback {name}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    if status == "done":
        return RunError(line, f"; {run.id} is done")
    run.update(error=line)
    return RunError(line, f"; {_saved(run)}")


def _saved(run: Run) -> str:
    step = _steps_done(run)
    return (f"saved up to step {step}" if step else f"nothing is saved yet in {run.id}") + go_on(run.root)


def _steps_done(run: Run) -> int:
    return max(
        (state.get("step", 0) for path, state in run.resumable() if not state_fault(state, path.name)), default=0
    )


def outline(config: ExperimentConfig, address: str | None = None, resume: Run | None = None) -> dict[str, Any]:
    """What `run` would do, without doing it: workers, device, replicas, steps. Joins a Ray only where an address is
    given; otherwise the plan is for this machine.

    Raises:
        UserError: as `run`.
    """
    from rayexp import workloads
    from rayexp.engine.runtime import replicas_of
    from rayexp.launch.local import here

    config = config.absolute()
    refuse_missing(config.tracking)
    if resume is None:
        config = starting.resolved(config)
    else:
        config = _as_begun(resume, config)
        check_unchanged(resume, config)
        check_code(resume.root, resume.meta(), config)
        config = with_copy(resume.root, config)
    nodes = [here()]
    address = address or os.environ.get("RAY_ADDRESS")
    if address and config.scaling.num_workers != 0:
        from rayexp.launch.on_ray import session

        with session.session(address):
            nodes = session.nodes()
    plan = planning.make(config, nodes)
    config = planning.with_threads(config, plan, cores())
    workload = workloads.open_workload(config)
    steps, workers = workload.steps(), max(1, plan.workers)
    return {
        "where": "this process" if not plan.workers else f"Ray, {counted(len(nodes), 'node')}",
        "workers": plan.workers,
        "device": "gpu" if plan.gpu else "cpu",
        "cpus_per_worker": plan.cpus,
        "gpus_per_worker": plan.gpus,
        "threads_per_shard": None if plan.gpu else config.threads_per_shard,
        "lanes_per_worker": replicas_of(config, config.shards // workers, plan.cpus, plan.gpu),
        "shards_per_worker": config.shards // workers,
        f"{workload.batch_unit}_per_worker": config.batch_size // workers,
        "steps_per_epoch": steps,
        "steps": steps * config.epochs,
        "warnings": passed_over(config, plan.gpu),
    }


# ---------------------------------------------------------------------- attempts


def _supervise(
    run: Run,
    config: ExperimentConfig,
    job: Callable[[Placement, int], WorkerJob],
    address: str | None,
    console: Console | None,
    stopping: Stopping,
    guest: bool,
) -> str:
    if config.scaling.num_workers == 0:
        from rayexp.launch.local import attempt, here

        if job_id():
            from rayexp.cluster import sources
            from rayexp.launch.on_ray import session

            with session.session(address):
                sources.publish(run)
        plan = planning.make(config, [here()])
        with screen(run, console) as shown:
            stopping.say = shown.say
            return attempt(run, job(plan, 1))
    from rayexp.launch.on_ray import session

    session.prepare(address)  # also: where nobody answers, that is said before Ray is imported
    ray_imported = _imported("rayexp.launch.on_ray.supervise")
    quiet = contextlib.nullcontext() if guest else chatter_to(run.logs / "ray.log", console)
    with quiet, screen(run, console) as shown, ray_imported as imports:
        shown.phase("starting Ray")
        stopping.say = shown.say

        def last(why: str) -> None:
            """End this process, which hangs in a call to a Ray that has ended. (A guest leaves that to Ray, which ends
            its drivers.)"""
            status = _status(run)
            if status != "done":
                _fail(run, HeadLostError(why), stopping, fresh=False)
            shown.close()
            shown.say("\n".join(last_words(f"{'stopped' if stopping() else f'error: {why}'}; {_saved(run)}")))
            if not guest:
                os._exit(0 if status == "done" else 128 + stopping.number if stopping.number else 1)

        with session.session(address) as own_ray:
            if own_ray and config.workload in WORKLOADS:  # one of the user's own reads its data as it likes
                # What is missing is refused at once, and the data is packed once.
                open_data(config.data, config.code, text=config.workload == "language_model")
            imports.join()
            from rayexp.launch.on_ray.head import watched
            from rayexp.launch.on_ray.supervise import supervise

            shown.phase("starting workers")
            with watched(own_ray, run, stopping, last) as watch:
                return supervise(run, config, job, shown, stopping, own_ray, watch)


@contextlib.contextmanager
def _imported(module: str) -> Iterator[threading.Thread]:
    """Import a module in a thread while the block begins: Ray's imports take as long as starting Ray. The block's end
    waits for the thread, because an import that is under way when the process ends prints a traceback."""
    thread = threading.Thread(target=importlib.import_module, args=[module], daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()
