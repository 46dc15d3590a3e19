"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once.

Before the first step there is nothing to save, so there the first ends it too.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from rayexp.runs import Run


@contextlib.contextmanager
def stoppable(run: Run, say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """While this lasts, a first signal makes the run's stop file; a further one raises KeyboardInterrupt.

    Gives a function that says whether a signal has come. Outside the main thread signals are left alone.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        again = asked.is_set()
        asked.set()
        if again or not run.progress_path.exists():
            raise KeyboardInterrupt
        run.stop_path.touch()
        say("stopping after this step; once more ends at once, with what was saved last")

    run.stop_path.unlink(missing_ok=True)
    run.progress_path.unlink(missing_ok=True)
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        run.stop_path.unlink(missing_ok=True)
