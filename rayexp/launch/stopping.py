"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from rayexp.runs import Run


@contextlib.contextmanager
def stoppable(run: Run, say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """While this lasts, a first signal makes the run's stop file; a second raises KeyboardInterrupt in the main thread.

    Gives a function that says whether a signal has come. Outside the main thread signals are left alone.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        run.stop_path.touch()
        say("stopping after this step; once more ends at once, with what was saved last")

    run.stop_path.unlink(missing_ok=True)
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        run.stop_path.unlink(missing_ok=True)
