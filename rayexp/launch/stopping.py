"""A run that is asked to stop: the first signal asks it to save and stop, the second ends it at once.

Before the first step there is nothing to save, so there the first ends it too.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

from rayexp.errors import Stopped
from rayexp.runs.run import Run
from rayexp.system.signals import handled

# `timeout` and batch systems send theirs to a process and to its group: what comes so soon after the first is the same.
SAME_S = 1.0


class Stopping:
    """Whether the run was asked to stop; calling it says so.

    Attributes:
        number: the signal that asked; None: none has.
        say: where the user is told.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.number: signal.Signals | None = None
        self.say: Callable[[str], None] = lambda text: None
        self._at = 0.0

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def ask(self, number: signal.Signals) -> None:
        """What a signal does."""
        again, now = self.number is not None, time.monotonic()
        if again and now - self._at < SAME_S:
            return
        self.number, self._at = number, now
        if again or not self.run.stepping():
            raise Stopped(number)
        self.run.stop_path.touch()
        self.say(f"{number.name}: stopping after this step; once more ends at once, with what was saved last")


@contextlib.contextmanager
def stoppable(run: Run) -> Iterator[Stopping]:
    """While this lasts, a first signal makes the run's stop file; a further one raises Stopped.

    Outside the main thread signals are left alone.
    """
    run.stop_path.unlink(missing_ok=True)
    run.progress_path.unlink(missing_ok=True)
    stopping = Stopping(run)
    try:
        with handled(stopping.ask):
            yield stopping
    finally:
        run.stop_path.unlink(missing_ok=True)
