"""Whether the Ray of a run still lives. Ray ends a driver whose Ray is gone without a word: some 13 s after its host's
raylet, 60 s after the head's GCS. Until then the workers go on, and can be asked to save.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import ray

from rayexp.cluster.discovery import answers
from rayexp.errors import UserError
from rayexp.launch.stopping import Stopping
from rayexp.runs.run import Run

RAYS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"  # Ray itself waits so long for a GCS; we, half of it
LOOK_S = 0.5
ANSWER_S = 2.0  # for a connection to be taken up
SAVE_S = 8.0  # for the workers to save what they are at
LEAVE_S = 3.0  # for the driver to take up that Ray is gone, if it does not hang in a call to Ray

forgotten = False  # whether this process should end at once when it ends: what Ray has left in it may crash


class Head:
    """The Ray that this process is connected to: its head, and the raylet of this host.

    Args:
        raylet, gcs: where they listen, host:port.
        patience: seconds for which the GCS may be away, because others may start it again.
    """

    def __init__(self, raylet: str, gcs: str, patience: float) -> None:
        self.raylet, self.gcs, self.patience = raylet, gcs, patience
        self._silent: float | None = None

    @classmethod
    def joined(cls, own: bool) -> Head:
        """The one that this process is connected to now; own: started for it."""
        context = ray.get_runtime_context()
        mine = next(n for n in ray.nodes() if n["NodeID"] == context.get_node_id())  # type: ignore[no-untyped-call]
        patience = 0.0 if own else float(os.environ.get(RAYS_PATIENCE) or 60) / 2
        return cls(f"{mine['NodeManagerAddress']}:{mine['NodeManagerPort']}", str(context.gcs_address), patience)

    def gone(self, patient: bool = True) -> str | None:
        """What of it has ended, or None.

        Args:
            patient: whether there is time to wait for the GCS.
        """
        if not answers(self.raylet, ANSWER_S):
            return f"the raylet of this host ({self.raylet}) has ended"
        now = time.monotonic()
        if answers(self.gcs, ANSWER_S):
            self._silent = None
        elif self._silent is None:
            self._silent = now
        if self._silent is not None and (not patient or now - self._silent >= self.patience):
            return f"Ray's head ({self.gcs}) has ended"
        return None


class HeadWatch(threading.Thread):
    """Looks after the head until `end`; when it is gone, has the workers save and stop.

    Attributes:
        lost: what has ended, once the workers have saved or had their time for it.
    """

    def __init__(self, head: Head, run: Run, stopping: Stopping, last: Callable[[str], None]) -> None:
        """
        Args:
            last: called where the driver does not take it up, because it hangs in Ray; must end the process.
        """
        super().__init__(name="head", daemon=True)
        self._head, self._run, self._stopping, self._last = head, run, stopping, last
        self.lost: str | None = None
        self._end = threading.Event()

    def run(self) -> None:
        """See threading.Thread."""
        while not self._end.wait(LOOK_S):
            if why := self._gone():
                self._save()
                self.lost = why
                break
        if self.lost and not self._end.wait(LEAVE_S):
            self._last(self.lost)

    def verdict(self) -> str | None:
        """`lost`, waited for where it is about to be."""
        while not self.lost and self._gone():
            time.sleep(0.1)
        return self.lost

    def _gone(self) -> str | None:
        return self._head.gone(patient=not self._stopping())

    def end(self) -> None:
        """Look no more."""
        self._end.set()

    def _save(self) -> None:
        if not self._run.stepping():
            return  # no step has been done
        until = time.monotonic() + SAVE_S
        with contextlib.suppress(OSError, UserError):
            self._run.stop_path.touch()
            while self._run.meta()["status"] == "running" and time.monotonic() < until:
                time.sleep(0.1)


@contextlib.contextmanager
def watched(own: bool, run: Run, stopping: Stopping, last: Callable[[str], None]) -> Iterator[HeadWatch]:
    """A Watch over the present Ray for as long as the block lasts; own: it was started for this run."""
    watch = HeadWatch(Head.joined(own), run, stopping, last)
    watch.start()
    try:
        yield watch
    finally:
        watch.end()


def forget() -> None:
    """Keep Ray from being shut down as this process ends: it would wait for what is gone, or crash."""
    global forgotten
    forgotten = True
    atexit.unregister(ray.shutdown)
