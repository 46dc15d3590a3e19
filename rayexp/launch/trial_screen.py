"""What `verify` shows: on a terminal a bar for the trial that runs, everywhere a line for each one that has ended."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayexp.display import counted, short
from rayexp.launch.screen import POLL_S, bar, show
from rayexp.runs.run import Run

if TYPE_CHECKING:
    from rich.console import Console


class TrialScreen:
    """Follows the trials of a verification in their folder.

    Attributes:
        total: how many trials there will be.
        begun: how many have begun.
    """

    def __init__(self, console: Console | None, folder: Path, total: int, steps: int) -> None:
        """`steps`: of a trial, unless its training ends before."""
        self.console, self.folder, self.total, self.steps = console, folder, total, steps
        self.begun = 0

    @contextlib.contextmanager
    def trial(self, name: str) -> Iterator[None]:
        """Show one trial while the block runs."""
        self.begun += 1
        head = f"trial {self.begun} of {self.total}: {name}"
        if self.console is None or not self.console.is_terminal:
            self.say(head)
            yield
            return
        known, end = set(self.folder.iterdir()), threading.Event()
        shown = bar(self.console)
        task = shown.add_task(head, total=None, figures="", rate="")
        follower = threading.Thread(target=self._follow, args=(shown, task, known, end), name="trial", daemon=True)
        with shown:
            follower.start()
            try:
                yield
            finally:
                end.set()
                follower.join()

    def say(self, text: str) -> None:
        """One line."""
        show(self.console, text)

    def ended(self, name: str, weights: str, steps: int, rate: str) -> None:
        """Say what came of the trial."""
        said = f"{counted(steps, 'step')}, {rate}, weights {short(weights)}"
        self.say(f"[{self.begun}/{self.total}] {name}: {said}")

    def _follow(self, shown: Any, task: Any, known: set[Path], end: threading.Event) -> None:
        while not end.wait(POLL_S):
            # A display must not cost a trial, and files are read while they are written.
            with contextlib.suppress(Exception):
                for root in set(self.folder.iterdir()) - known:
                    if done := last_step(root):
                        steps = min(self.steps, steps_of(root) or self.steps)
                        shown.update(task, completed=done, total=steps, figures=f"step {done} of {steps}")


def last_step(root: Path) -> int:
    """The newest step in a run's trace.jsonl; 0 where there is none yet."""
    try:
        whole = (root / "trace.jsonl").read_bytes().rpartition(b"\n")[0]
    except OSError:
        return 0
    return int(json.loads(whole.rpartition(b"\n")[2])["step"]) if whole else 0


def steps_of(root: Path) -> int:
    """The steps of the whole run; 0 where they are not known yet."""
    run = Run(root)
    return int(run.meta().get("steps_per_epoch") or 0) * run.config().epochs


def worded(workers: int, how: str = "") -> str:
    """`in one process`, `1 worker`, `4 workers, one killed`, `ddp, 4 workers`."""
    where = counted(workers, "worker") if workers else "in one process"
    return f"ddp, {where}" if how == "ddp" else f"{where}, {how}" if how else where
