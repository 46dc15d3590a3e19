"""Workers write a run only while the driver that started them drives it: a driver that is killed leaves workers behind
for some seconds, and another may have taken up the run by then.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from typing import Any

from rayexp.launch.faults import LostError
from rayexp.runs.writer import RunWriter
from rayexp.system.locks import driver_of

LOOK_S = 0.5  # how often a worker that only asks whether to stop looks after its driver


def end_with_parent() -> None:
    """From now on, end this process soon after its parent: nobody else would, and it may wait for others for days."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, args=[os.getppid()], daemon=True).start()


class Fenced:
    """A Recorder's methods, refused with LostError once the driver has ended.

    Args:
        recorder: what writes.
        driver: the token of the driver's hold of the lock.
    """

    def __init__(self, recorder: RunWriter, driver: str) -> None:
        self._recorder, self._driver = recorder, driver
        self._looked = 0.0

    def driven(self) -> bool:
        """Whether the driver is there, as far as this host can see."""
        holder = driver_of(self._recorder.run.root)
        return holder is not None and holder.token == self._driver

    def _call(self, method: str, *args: Any, **fields: Any) -> Any:
        if not self.driven():
            raise LostError("its driver has ended")
        return getattr(self._recorder, method)(*args, **fields)

    def __getattr__(self, method: str) -> Any:
        return functools.partial(self._call, method)

    def stop_requested(self) -> bool:
        """See Recorder; asked before every step, so the driver is looked after now and then only."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return self._recorder.stop_requested()
        self._looked = now
        return bool(self._call("stop_requested"))

    def log(self, rank: int, text: str) -> None:
        """See Recorder; what nobody is there to read is not written."""
        if self.driven():
            self._recorder.log(rank, text)
