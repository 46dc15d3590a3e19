"""Join a running Ray or start one here, quietly, and say what it has."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.authentication.authentication_token_setup
import ray._private.node
import ray._private.state
import ray._private.worker

from rayexp.cluster import auth, discovery
from rayexp.config import ExperimentConfig
from rayexp.errors import Stopped, UserError
from rayexp.launch.on_ray import head
from rayexp.launch.placement import Node, Placement, capacity
from rayexp.system import signals
from rayexp.system.cores import cores

# Read by processes that Ray starts from here.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    # glibc's first arena alone can keep freed blocks of more than 64 MiB, and training runs in a thread of a worker,
    # which has another: 66,000 page faults and 6 % of a step with 256 images in a pass.
    "MALLOC_ARENA_MAX": "1",
}

# A Ray of our own keeps no books that others would read, and does without the Python processes that stream logs to the
# driver's screen (rayexp reads the files) and ask a cloud for machines; where runs come one after another, also without
# the one that answers for a dashboard. Each starts beside the workers and then takes from their cores.
_NO_BOOKS = {
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
}
_NOT_NEEDED = ("start_log_monitor", "start_monitor")
_DASHBOARD = "start_api_server"


@contextlib.contextmanager
def environment(fields: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that the user has not set, for as long as the block lasts."""
    new = {name: value for name, value in fields.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


@contextlib.contextmanager
def replaced(owner: Any, **fields: Any) -> Iterator[None]:
    """Set attributes for as long as the block lasts; one that is not there stays away, so that another Ray is no
    trouble."""
    kept = {name: getattr(owner, name) for name in fields if hasattr(owner, name)}
    for name in kept:
        setattr(owner, name, fields[name])
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def session(address: str | None, for_tune: bool = False) -> Iterator[bool]:
    """A connection to Ray for as long as the block lasts; one that is there already is used and left open.

    Args:
        address: of a running Ray; None: RAY_ADDRESS, else the one `ray start` has left here, else a new one.
        for_tune: whether runs are started by Ray Tune's trials, and so in other processes than this.

    Gives whether this Ray was started here, for this block alone.

    Raises:
        UserError: there is no Ray at that address, or none can be started here.
    """
    if ray.is_initialized():
        yield False
        return
    address = running(address)
    words: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if not address:
        words |= {"address": "local", "include_dashboard": False, "num_cpus": cores()}
    else:
        words["address"] = address
    try:
        without = _NOT_NEEDED if for_tune else (*_NOT_NEEDED, _DASHBOARD)
        with contextlib.ExitStack() as stack:
            stack.enter_context(environment(_QUIET))
            if not address:
                stack.enter_context(environment(_NO_BOOKS | {"RAY_TMPDIR": str(discovery.temp_folder())}))
                stack.enter_context(replaced(ray._private.node.Node, **dict.fromkeys(without, _nothing)))
            _bring_token(address)
            stack.enter_context(_own_sigterm())
            _connect(words)
    except ConnectionError as error:
        raise UserError(f"{address}: no Ray answers there ({' '.join(str(error).split())[:200]})") from error
    there = head.Head.joined(own=not address)
    try:
        yield not address
    finally:
        started = [] if address else _started()
        if there.gone(patient=False):
            head.forget()
        else:
            with _hurried(started), _own_sigterm():
                ray.shutdown()
        # A process of Ray's whose end falls together with Ray's own may wait for ever for what is gone.
        _kill(started)


def _connect(words: Mapping[str, Any]) -> None:
    """ray.init; where a signal ends it, nothing of it is left."""
    others = psutil.Process().children()
    try:
        with signals.shielded() if words["address"] == "local" else contextlib.nullcontext():
            ray.init(**words)
    except BaseException as error:
        mine = [child for child in psutil.Process().children() if child not in others]
        mine += [grandchild for child in mine for grandchild in child.children(recursive=True)]
        ray.shutdown()
        _kill(mine)
        if isinstance(error, SystemExit):
            raise Stopped(signal.SIGTERM) from error
        raise


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """What SIGTERM does here stays: ray.init sets a handler of its own, which would end the command in the middle of
    its work, and ray.shutdown goes back to the system's, unseen by Python's getsignal."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _hurried(processes: list[psutil.Process]) -> Iterator[None]:
    """Ray asks its processes to end by SIGTERM, which they do not hear, and gives each a second; each ends at once."""
    waiting = [p for p in processes if not _asked_to_end(p)]
    over = threading.Event()

    def hurry() -> None:
        while not over.wait(0.02):
            _kill([p for p in waiting if _asked_to_end(p)])

    thread = threading.Thread(target=hurry, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _asked_to_end(process: psutil.Process) -> bool:
    """Whether a SIGTERM waits for a process that does not hear it; False where the system does not tell."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    pending = re.search(r"^ShdPnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return pending is not None and bool(int(pending[1], 16) >> (signal.SIGTERM - 1) & 1)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _started() -> list[psutil.Process]:
    """The processes of the Ray that was started here; none if it has been shut down meanwhile."""
    found = []
    node: Any = ray._private.worker._global_node
    for kind in node.all_processes.values() if node else ():
        for entry in kind:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(entry.process.pid)
                found += [process, *process.children(recursive=True)]
    return found


def running(address: str | None) -> str | None:
    """The address of the Ray that `session` would join; None where it would start one (UserError: see
    `discovery.named_address`)."""
    if not address and os.environ.get("RAY_ADDRESS") == "local":
        return None
    return discovery.named_address(address) or discovery.started_here()


def _nothing(node: Any, **words: Any) -> None:
    """What a Ray of our own does instead of starting a process that it does without."""


def _bring_token(address: str | None) -> None:
    """A Ray started here gets a token that only its owner can read; one that is joined is shown the token we have,
    which Ray does by itself only where no address is given."""
    if not address:
        auth.make_token()
    elif "RAY_AUTH_MODE" not in os.environ and auth.token():
        ray._private.authentication.authentication_token_setup._enable_token_auth()


def nodes() -> list[Node]:
    """The machines that Ray counts as alive, the driver's first."""
    here = ray.get_runtime_context().get_node_id()
    every = ray.nodes()  # type: ignore[no-untyped-call]
    alive = sorted((n for n in every if n["Alive"]), key=lambda n: n["NodeID"] != here)
    return [Node(n["NodeManagerAddress"], *_size(n["Resources"])) for n in alive]


def room(plan: Placement, config: ExperimentConfig) -> int:
    """The largest allowed number of workers that fits: those that `plan` has, and more into what is free now."""
    free = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    spare = [Node(name, *_size(resources)) for name, resources in free.items()]
    total = plan.workers + capacity(spare, plan.cpus or 1.0, plan.gpus)
    high = config.scaling.num_workers[1] if isinstance(config.scaling.num_workers, tuple) else plan.workers
    return max(n for n in [*config.allowed_workers, plan.workers] if n <= min(total, high))


def placeable(plan: Placement, seconds: float) -> bool:
    """Whether the plan's workers find their places within that time; Ray's list of nodes may be some seconds old."""
    size = {"CPU": plan.cpus or 1.0} | ({"GPU": plan.gpus} if plan.gpu else {})
    group = ray.util.placement_group([size] * plan.workers)
    try:
        return bool(group.wait(seconds))
    finally:
        ray.util.remove_placement_group(group)


def node_id() -> str:
    """The driver's own node."""
    return str(ray.get_runtime_context().get_node_id())


def _size(resources: Mapping[str, float]) -> tuple[float, float]:
    return float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
