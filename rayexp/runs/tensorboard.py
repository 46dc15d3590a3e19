"""TensorBoard's event files of one run, written as they are said: no queue, no thread, and errors where they belong.

    tb/events.out.tfevents.<seconds>.<host>    one for each attempt; TensorBoard reads them in the order of their names
    tb/events.out.tfevents.0.graph             the model's graph (see Recorder.graph)
    tb/hparams/                                hyperparameters with the result

A later attempt begins with a mark from which TensorBoard forgets what an earlier one said of its steps.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import hparams, scalar, text

from rayexp.system.disk import naming

logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # its "NaN or Inf found" says neither where nor what

FILE = "events.out.tfevents."
VERSION = "brain.Event:2"


class Board:
    """One event file. Its steps are epochs."""

    def __init__(self, folder: Path, purge: int | None = None, name: str | None = None) -> None:
        """Begin a file.

        Args:
            folder: made where it is missing.
            purge: forget what earlier files say of this step and of later ones; None: nothing.
            name: of the file; None: one of its own, after all earlier ones.

        Raises:
            WriteError: the file cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard goes by the names: a later file has a later one, also in the same second or after a clock change.
        stamps = [path.name.removeprefix(FILE).split(".")[0] for path in folder.glob(f"{FILE}*")]
        earlier = [int(stamp) for stamp in stamps if stamp.isdecimal() and int(stamp)]
        self.attempt = len(earlier)  # counts from 0
        stamp = max([int(time.time()), *(stamp + 1 for stamp in earlier)])
        self.path = folder / (name or f"{FILE}{stamp:010d}.{socket.gethostname()}")
        with naming(self.path):
            self._file = RecordWriter(str(self.path))
        self._write(file_version=VERSION)
        if purge is not None:
            self._write(purge, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point on each curve, on disk when this returns."""
        for name, value in values.items():
            self.summary(step, scalar(name, value))
        self.flush()

    def text(self, tag: str, words: str) -> None:
        """A text in Markdown, of this attempt: its step counts attempts, since a mark makes nobody forget a text."""
        self.summary(self.attempt, text(tag, words))

    def summary(self, step: int, summary: Any) -> None:
        """Any other summary of TensorBoard's."""
        self._write(step, summary=summary)

    def flush(self) -> None:
        """Until all is on disk."""
        with naming(self.path):
            self._file.flush()

    def close(self) -> None:
        """End the file."""
        with naming(self.path):
            self._file.close()

    def _write(self, step: int = 0, **fields: Any) -> None:
        with naming(self.path):
            self._file.write(Event(wall_time=time.time(), step=step, **fields).SerializeToString())


def write_hyperparameters(folder: Path, words: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """A row of TensorBoard's HPARAMS page; it replaces what the folder holds."""
    shutil.rmtree(folder, ignore_errors=True)
    board = Board(folder, name=f"{FILE}0.hparams")  # one name, so that a copy of the folder is brought up to date
    for summary in hparams(dict(words), dict(metrics)):
        board.summary(0, summary)
    board.scalars(0, metrics)
    board.close()
