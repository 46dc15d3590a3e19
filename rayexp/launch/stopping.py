"""Stop a run by signal: the first signal asks it to save and stop, a second one ends it at once.

Before the first step there is nothing to save, and the first signal ends it at once.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

from rayexp.errors import Stopped
from rayexp.runs.run import Run
from rayexp.system.signals import handled

# `timeout` and batch systems send a signal to a process and to its group: one that follows so soon is the same request.
SAME_S = 1.0


class Stopping:
    """Whether the run was asked to stop: call it to know.

    Attributes:
        number: the signal that asked first; None: none has.
        say: shows a line to the user.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.number: signal.Signals | None = None
        self.say: Callable[[str], None] = lambda text: None
        self._at = 0.0
        self._halted = False

    def __call__(self) -> bool:
        """Whether a signal has arrived, or the program has asked."""
        return self._halted or self.number is not None

    def halt(self) -> None:
        """Ask the run to save and stop without a signal."""
        self._halted = True
        self.run.stop_path.touch()

    def ask(self, number: signal.Signals) -> None:
        """Handle a signal.

        Raises:
            Stopped: it is a second request, or there is nothing to save.
        """
        again, now = self.number is not None, time.monotonic()
        if again and now - self._at < SAME_S:
            return
        self.number, self._at = number, now
        if again or not self.run.stepping():
            raise Stopped(number)
        self.run.stop_path.touch()
        self.say(f"{number.name}: stopping after this step; one more ends at once, as it was last saved")


@contextlib.contextmanager
def stoppable(run: Run) -> Iterator[Stopping]:
    """While the block runs, a first signal creates the run's stop file, and another one raises Stopped.

    Outside the main thread no signal is handled.
    """
    run.stop_path.unlink(missing_ok=True)
    run.progress_path.unlink(missing_ok=True)
    stopping = Stopping(run)
    try:
        with handled(stopping.ask):
            yield stopping
    finally:
        run.stop_path.unlink(missing_ok=True)
