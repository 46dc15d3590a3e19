"""A service that is told by a thread of its own, so that no step waits for it and no error of its ends the run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence

from rayexp.runs.records import EpochRecord, one_line
from rayexp.runs.run import Run
from rayexp.runs.trackers.tracker import Axis, Service, points, recall, remember, scalars

END_S = 30.0  # how long the end of a run waits for a tracker that has not been told all
WAITING = 10_000  # calls that wait for a tracker that does not answer; more are dropped, the run directory has them all


class BackgroundTracker:
    """Hands calls on to a service, in their order. Its first error becomes a warning; it is told of later calls, since
    it may come back. What it has been told is noted in the run directory: steps that are trained again after an
    interruption are not told again, and of epochs those that it missed are told as well.

    Attributes:
        warnings: what has gone wrong, one line at most, until it is taken.
        ended: whether `end` was called.

    Args:
        name: of the service.
        run: what it follows.
        make: makes the service; None: the one of this name.
    """

    def __init__(self, name: str, run: Run, make: Callable[[Run], Service] | None = None) -> None:
        self.name, self.run, self._make = name, run, make or _maker(name)
        self.warnings: list[str] = []
        self.ended = False
        self._service: Service | None = None
        self._failed = False
        self._calls: queue.Queue[Callable[[Service], None] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """See Tracker."""
        self._put(lambda service: None)  # making it is its beginning

    def steps(self, first: int, loss: Sequence[float | None], lr: Sequence[float | None]) -> None:
        """See Tracker."""
        rows, last = list(points(first, loss, lr)), first + len(loss) - 1
        self._put(lambda service: self._log(service, rows, "step", last))

    def epoch(self, record: EpochRecord) -> None:
        """See Tracker."""

        def log(service: Service) -> None:
            rows = [(one.epoch, scalars(one)) for one in self.run.records() if one.epoch <= record.epoch]
            self._log(service, rows, "epoch", record.epoch)

        self._put(log)

    def _log(self, service: Service, rows: Sequence[tuple[int, Mapping[str, float]]], axis: Axis, last: int) -> None:
        known = recall(self.run, self.name).get(axis, 0)
        service.log([row for row in rows if row[0] > known], axis)
        remember(self.run, self.name, **{axis: max(known, last)})

    def end(self, status: str) -> None:
        """See Tracker; waits for it, but not for long."""
        self.ended = True
        self._put(lambda service: service.end(status))
        self._put(None)
        self._thread.join(END_S)
        if self._thread.is_alive():
            self._warn(f"it has not answered for {END_S:.0f} s")

    def take_warnings(self) -> list[str]:
        """The warnings since the last call."""
        taken, self.warnings = self.warnings, []
        return taken

    def _put(self, call: Callable[[Service], None] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._warn("it does not answer")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                if self._service is None:
                    made = self._make(self.run)
                    made.begin()
                    self._service = made
                call(self._service)
            except BaseException as error:  # of a foreign library, in a thread that nobody interrupts
                self._warn(f"{type(error).__name__}: {one_line(error)[:300]}")

    def _warn(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            self.warnings = [*self.warnings, f"tracking: {self.name}: {why}; the run goes on, metrics.csv has it all"]


def _maker(name: str) -> Callable[[Run], Service]:
    def make(run: Run) -> Service:
        if name == "mlflow":
            from rayexp.runs.trackers.mlflow import Mlflow

            return Mlflow(run)
        from rayexp.runs.trackers.wandb import Wandb

        return Wandb(run)

    return make
