"""A program's callbacks: told in the driver's process what the run directory says, wherever the workers are."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rayexp.errors import UserError
from rayexp.runs.records import EpochRecord, read_lines
from rayexp.runs.run import Run

EVENTS = ("on_epoch", "on_step")
LOOK_S = 0.1


class Listeners:
    """Tells callbacks of a run from `open` to `close`, in a thread of its own, one call at a time.

    `on_epoch(record)` gets the EpochRecord of every epoch that this call trains, in order; all have been told when
    `close` returns. `on_step(progress)` gets how far the epoch is, a few times a second and not for every step:
    `epoch`, `epochs`, `step` and `steps` (of the epoch), `loss` (nats), `rate` (samples a second) and their `unit`.

    Attributes:
        failure: what a callback has raised, and its name; no callback is told anything after that.
    """

    def __init__(self, run: Run, callbacks: Sequence[object], stop: Callable[[], None]) -> None:
        """
        Args:
            stop: called once, when a callback has failed: has the run save and stop.

        Raises:
            UserError: an object has none of the methods.
        """
        for callback in callbacks:
            if not any(callable(getattr(callback, event, None)) for event in EVENTS):
                raise UserError(f"callbacks: {_name(callback)} has none of the methods {', '.join(EVENTS)}")
        self.run, self.callbacks, self.stop = run, callbacks, stop
        self.failure: tuple[str, BaseException] | None = None
        self._told = max((record.epoch for record in self._records()), default=0)
        self._seen: tuple[int, ...] = ()  # inode, bytes and time of epochs.jsonl as it was last read
        self._progress = b""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="callbacks", daemon=True)

    def open(self) -> None:
        """Start to follow the run."""
        if self.callbacks:
            self._thread.start()

    def close(self) -> None:
        """Tell what is new since the last look."""
        if self.callbacks:
            self._end.set()
            self._thread.join()

    def _follow(self) -> None:
        ended = False
        while not ended and self.failure is None:
            ended = self._end.wait(LOOK_S)
            self._look()

    def _look(self) -> None:
        # Read before the epochs, so that an epoch's steps are told before its end.
        if "step" in (progress := self._new_progress()) and progress["epoch"] > self._told:
            self._tell("on_step", progress)
        for record in self._new_records():
            self._told = record.epoch
            self._tell("on_epoch", record)

    def _new_progress(self) -> dict[str, Any]:
        """What progress.json says, where it has changed; else nothing."""
        try:
            found = self.run.progress_path.read_bytes()
            before, self._progress = self._progress, found
            return dict(json.loads(found)) if found != before else {}
        except (OSError, ValueError):
            return {}

    def _new_records(self) -> list[EpochRecord]:
        """The epochs that nobody was told of; a long file is read only where it has changed."""
        try:
            found = self.run.epochs_path.stat()
        except OSError:
            return []
        before, self._seen = self._seen, (found.st_ino, found.st_size, found.st_mtime_ns)
        return [record for record in self._records() if record.epoch > self._told] if self._seen != before else []

    def _records(self) -> list[EpochRecord]:
        return read_lines(self.run.epochs_path, EpochRecord.from_json, [])

    def _tell(self, event: str, value: EpochRecord | Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is None or self.failure is not None:
                continue
            try:
                method(value)
            except BaseException as error:
                self.failure = f"{_name(callback)}.{event}", error
                self.stop()


@contextlib.contextmanager
def listening(run: Run, callbacks: Sequence[object], stop: Callable[[], None]) -> Iterator[Listeners]:
    """Listeners that are open while the block runs."""
    listeners = Listeners(run, callbacks, stop)
    listeners.open()
    try:
        yield listeners
    finally:
        listeners.close()


def _name(callback: object) -> str:
    return callback.__name__ if isinstance(callback, type) else type(callback).__name__
