"""Workers write a run only while the driver that started them holds its lock: workers outlive a killed driver for some
seconds, and by then another driver may have resumed the run.
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

LOOK_S = 0.5  # how often a worker checks for its driver when it only asks whether to stop


def end_with_parent(parent: int) -> None:
    """End this process soon after its parent ends; otherwise it might wait for other workers for days.

    Args:
        parent: the number of the process that has started this one, and that may be gone already.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Fenced:
    """A RunWriter's methods, which raise LostError once the driver has ended.

    Args:
        writer: writes the run.
        driver: the token of the lock that the driver holds.
    """

    def __init__(self, writer: RunWriter, driver: str) -> None:
        self._writer, self._driver = writer, driver
        self._looked = 0.0

    def driven(self) -> bool:
        """Whether the driver still holds its lock, as far as this host can see."""
        holder = driver_of(self._writer.run.root)
        return holder is not None and holder.token == self._driver

    def _call(self, method: str, *args: Any, **fields: Any) -> Any:
        if not self.driven():
            raise LostError("its driver has ended")
        return getattr(self._writer, method)(*args, **fields)

    def __getattr__(self, method: str) -> Any:
        return functools.partial(self._call, method)

    def stop_requested(self) -> bool:
        """See RunWriter. It is called before every step, so the driver is checked only every LOOK_S."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return self._writer.stop_requested()
        self._looked = now
        return bool(self._call("stop_requested"))

    def log(self, rank: int, text: str) -> None:
        """See RunWriter; without a driver nothing is written, and nothing is raised."""
        if self.driven():
            self._writer.log(rank, text)
