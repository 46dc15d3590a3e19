"""Join a running Ray or start one here, quietly, and say what it has.

Ray reads RAY_AUTH_MODE when it is imported, so `prepare` sets it before, and Ray is imported where it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from rayexp.cluster import auth, discovery
from rayexp.config import ExperimentConfig
from rayexp.errors import Stopped, UserError
from rayexp.launch.placement import Node, Placement, capacity
from rayexp.system import signals
from rayexp.system.cores import cores
from rayexp.system.threads import PATIENT

# Read by processes that Ray starts from here.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    **PATIENT,
}

# A Ray of our own ends with the run: nobody reads its metrics, and no node of it is taken away.
_OWN = {
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # All of its workers are on this machine, whose name need not resolve.
    **({"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}),
}
# Elsewhere each worker finds the interface of its own node.
_SETUP_HOOK = {"worker_process_setup_hook": "rayexp.launch.on_ray.rendezvous.choose_interface"}

# Whether Ray was imported with tokens here. It stays so for the life of the process, and what is started later must be
# told, even where a program has its environment variables as before.
_tokens = False


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


def prepare(address: str | None) -> None:
    """Settle, before Ray is imported, whether it wants a token.

    A Ray started here gets one that only its owner can read; one that is joined is shown the token we have, which Ray
    does by itself only where no address is given.

    Raises:
        UserError: the token cannot be kept; and see `running`.
    """
    if not running(address):
        auth.make_token()
    global _tokens
    if ("ray" not in sys.modules or _tokens) and "RAY_AUTH_MODE" not in os.environ and auth.token():
        os.environ["RAY_AUTH_MODE"] = "token"
        _tokens = True


@contextlib.contextmanager
def session(address: str | None, for_tune: bool = False) -> Iterator[bool]:
    """A connection to Ray for as long as the block lasts; one that is there already is used and left open.

    Args:
        address: of a running Ray; None: RAY_ADDRESS, else the one `ray start` has left here, else a new one.
        for_tune: whether runs are started by Ray Tune's trials, and so in other processes than this. Where one of these
            dies, Ray Train frees what it held, and asks the dashboard whether it lives.

    Gives whether this Ray was started here, for this block alone.

    Raises:
        UserError: there is no Ray at that address, it is of another version, or none can be started here.
    """
    if _connected():
        yield False
        return
    prepare(address)
    import ray

    from rayexp.launch.on_ray import head

    address = running(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address:
        options |= {"address": address, "runtime_env": _SETUP_HOOK}
    else:
        options |= {"address": "local", "include_dashboard": for_tune, "num_cpus": cores()}
    own = {} if address else _OWN | {"RAY_TMPDIR": str(discovery.temp_folder())}
    with environment(own):
        try:
            with environment(_QUIET), signals.own_sigterm():
                started = _connect(options)
        except ConnectionError as error:
            raise UserError(f"{address}: no Ray answers there ({' '.join(str(error).split())[:200]})") from error
        except RuntimeError as error:
            if unlike := _unlike(str(error)):
                raise UserError(f"{address}: {unlike}") from error
            raise
        there = head.Head.joined(own=not address)
        try:
            yield not address
        finally:
            tree = _tree(started)
            if there.gone(patient=False):
                head.forget()
            else:
                with _hurried(tree), signals.own_sigterm():
                    ray.shutdown()
            # A process of Ray's whose end falls together with Ray's own may wait for ever for what is gone.
            _kill(tree)


def _connected() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray  # which waits where another thread is at it

    return bool(ray.is_initialized())


def _connect(options: Mapping[str, Any]) -> list[psutil.Process]:
    """ray.init; returns the processes that it has started here. Where a signal ends it, nothing of it is left."""
    import ray

    others = psutil.Process().children()
    own = options["address"] == "local"
    try:
        with signals.shielded() if own else contextlib.nullcontext():
            ray.init(**options)
    except BaseException as error:
        mine = _tree([child for child in psutil.Process().children() if child not in others])
        ray.shutdown()
        _kill(mine)
        if isinstance(error, SystemExit):
            raise Stopped(signal.SIGTERM) from error
        raise
    return [child for child in psutil.Process().children() if child not in others] if own else []


def _unlike(said: str) -> str:
    """What differs between the Ray that is there and this one, by what `ray.init` says of it; else an empty string."""
    there, here = (
        dict(re.findall(r"^\s*(Ray|Python): (\S+)", part, re.MULTILINE))
        for part in said.partition("This process on")[::2]
    )
    both = [(name, there[name], here[name]) for name in ("Ray", "Python") if name in there and name in here]
    unlike = [(name, theirs, ours) for name, theirs, ours in both if theirs != ours]
    if not said.startswith("Version mismatch") or not unlike:
        return ""
    theirs, ours = (" and ".join(f"{row[0]} {row[side]}" for row in unlike) for side in (1, 2))
    return f"this Ray has {theirs}, and here is {ours}; both sides need the same versions of Ray and Python"


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


def _tree(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of the processes that still run, and all below them."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running():
                found += [process, *process.children(recursive=True)]
    return found


def running(address: str | None) -> str | None:
    """The address of the Ray that `session` would join; None where it would start one (UserError: see
    `discovery.named_address`)."""
    if not address and os.environ.get("RAY_ADDRESS") == "local":
        return None
    return discovery.named_address(address) or discovery.started_here()


def nodes() -> list[Node]:
    """The machines that Ray counts as alive, the driver's first."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    every = ray.nodes()  # type: ignore[no-untyped-call]
    alive = sorted((n for n in every if n["Alive"]), key=lambda n: n["NodeID"] != here)
    return [Node(n["NodeManagerAddress"], *_size(n["Resources"])) for n in alive]


def room(plan: Placement, config: ExperimentConfig, seconds: float) -> int:
    """The largest allowed number of workers for which there is room: those that `plan` has, and more where they find
    places within that time."""
    import ray

    high = config.scaling.num_workers[1] if isinstance(config.scaling.num_workers, tuple) else plan.workers
    there = ray.available_resources()  # type: ignore[no-untyped-call]
    free = Node("the cluster", *_size(there))  # whether it lies together on the nodes, a placement tells
    high = min(high, plan.workers + capacity([free], plan.cpus or 1.0, plan.gpus))
    for workers in sorted(config.allowed_workers, reverse=True):
        if plan.workers < workers <= high:
            extra = dataclasses.replace(plan, workers=workers - plan.workers)
            if placeable(extra, seconds):
                return workers
    return plan.workers


def placeable(plan: Placement, seconds: float) -> bool:
    """Whether the plan's workers find their places within that time; Ray's list of nodes may be some seconds old."""
    import ray.util

    size = {"CPU": plan.cpus or 1.0} | ({"GPU": plan.gpus} if plan.gpu else {})
    group = ray.util.placement_group([size] * plan.workers)
    try:
        return bool(group.wait(seconds))
    finally:
        ray.util.remove_placement_group(group)


def node_id() -> str:
    """The driver's own node."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _size(resources: Mapping[str, float]) -> tuple[float, float]:
    return float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
