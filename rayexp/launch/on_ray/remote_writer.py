"""The run writer, held on the driver's host for workers that sit elsewhere: so no storage needs to be shared.

A worker that sees the driver's own run directory (a nonce in it tells) writes there itself, which is cheaper.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayexp.launch.fence import Fenced
from rayexp.launch.job import WorkerJob
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter

NONCE = "nonce"
ASK_S = 0.5  # how long an answer to "shall I stop?" is good for


class WriterActor:
    """The actor on the driver's host: a RunWriter, one call at a time."""

    def __init__(self, root: str, driver: str) -> None:
        self.writer = Fenced(RunWriter(Run(Path(root))), driver)

    def call(self, method: str, *args: Any, **fields: Any) -> Any:
        """Call a method of the RunWriter."""
        return getattr(self.writer, method)(*args, **fields)


class RemoteWriter:
    """A RunWriter's methods, carried out by the WriterActor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._stop = False
        self._asked = 0.0
        self._lock = threading.Lock()

    def _call(self, method: str, *args: Any, **fields: Any) -> Any:
        try:
            return ray.get(self._actor.call.remote(method, *args, **fields))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None

    def __getattr__(self, method: str) -> Any:
        return functools.partial(self._call, method)

    def progress(self, fields: Mapping[str, Any]) -> None:
        """See RunWriter; nobody waits for it."""
        self._actor.call.remote("progress", dict(fields))

    def stop_requested(self) -> bool:
        """See RunWriter; asked in the background, so that no step waits for another host."""
        now = time.monotonic()
        if now - self._asked >= ASK_S and self._lock.acquire(blocking=False):
            self._asked = now
            threading.Thread(target=self._ask, daemon=True).start()
        return self._stop

    def _ask(self) -> None:
        try:
            self._stop = bool(self._call("stop_requested"))
        finally:
            self._lock.release()


def start_writer(run: Run, nonce: str, node: str, driver: str) -> Any:
    """Start the WriterActor on the driver's node. The driver owns it: an actor ends with the process that made it."""
    return (
        ray.remote(num_cpus=0)(WriterActor)
        .options(name=_name(nonce), scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(str(run.root), driver)
    )


def open_writer(job: WorkerJob) -> Any:
    """A worker's run writer: a RunWriter where the driver's run directory and its lock are in sight, else a
    RemoteWriter."""
    writer = Fenced(RunWriter(Run(job.run)), job.driver)
    try:
        seen = (job.run / NONCE).read_text() == job.nonce
    except OSError:
        seen = False
    # Not every shared file system shows another host's locks.
    if seen and (job.nodes == 1 or writer.driven()):
        return writer
    return RemoteWriter(ray.get_actor(_name(job.nonce)))


def _name(nonce: str) -> str:
    return f"rayexp-{nonce}"
