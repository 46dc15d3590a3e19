"""What a grid shows while it runs: a line for every cell that starts or ends, and the running cell's own screen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rayexp.grid.comparison import Comparison
from rayexp.launch.screen import Screen, show
from rayexp.runs.run import Run

if TYPE_CHECKING:
    from rich.console import Console

POLL_S = 0.5


class Follower:
    """Follows the one cell that runs. Its run directory is found by its name, since another process makes it."""

    def __init__(self, comparison: Comparison, console: Console | None, total: int) -> None:
        self.comparison, self.console, self.total = comparison, console, total
        self.count = 0
        self.begun: Callable[[], object] = lambda: None  # called when Tune begins
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Tune pickles its callbacks into its state, which nobody reads; a terminal cannot be pickled.
        return object, ()

    def say(self, text: str) -> None:
        """One line."""
        show(self.console, text)

    def start(self, cell: str, repeat: int) -> None:
        """A cell starts."""
        self.close()
        self.count += 1
        self.say(f"[{self.count}/{self.total}] {cell}, repeat {repeat}")
        if self.console is None:
            return
        known = {run.id for run in Run.all(self.comparison.cells_path)}
        self._end.clear()
        self._thread = threading.Thread(target=self._follow, args=(known,), name="follower", daemon=True)
        self._thread.start()

    def end(self, text: str) -> None:
        """It has ended."""
        self.close()
        self.say(f"        {text}")

    def close(self) -> None:
        """Let go of the terminal."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _follow(self, known: set[str]) -> None:
        while not self._end.wait(POLL_S):
            fresh = [run for run in Run.all(self.comparison.cells_path) if run.id not in known]
            if fresh:
                screen = Screen(fresh[-1], self.console, named=False)
                screen.open()
                self._end.wait()
                screen.close()


def callback(follower: Follower) -> Any:
    """The follower as Ray Tune wants it."""
    from ray import tune

    def job(trial: Any) -> Mapping[str, Any]:
        found: Mapping[str, Any] = trial.config["job"]
        return found

    class TrialWatch(tune.Callback):
        """Passes on what Tune says of its trials."""

        def setup(self, *args: Any, **info: Any) -> None:
            follower.begun()

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            follower.start(job(trial)["cell"], job(trial)["repeat"])

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            follower.end(trial.last_result.get("line", "done"))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            follower.end("failed: its process died")

    return TrialWatch()
