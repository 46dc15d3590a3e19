"""The TensorBoard event files of a run. Each event is written at once, without a queue or a thread, so that an error is
raised where it happens.

    tb/events.out.tfevents.<seconds>.<host>    one per attempt; TensorBoard reads them in the order of their names
    tb/events.out.tfevents.0.graph             the model's graph (see RunWriter.graph)
    tb/steps/                                  loss and learning rate by optimizer step, one file per attempt
    tb/hparams/                                hyperparameters with the result

Each attempt begins its file with an event that makes TensorBoard drop the steps that are trained again.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter, register_writer_factory
from tensorboardX.summary import hparams, scalar, text

from rayexp.runs.records import EpochRecord
from rayexp.runs.run import Run
from rayexp.runs.trackers.tracker import points, scalars
from rayexp.system.disk import naming

logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # its "NaN or Inf found" names no place and no value

FILE = "events.out.tfevents."
VERSION = "brain.Event:2"


class TensorBoard:
    """The tracker whose files are part of the run directory (see trackers.Tracker): an error in writing them is one of
    the run. Its files are made when there is something to write."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._board: Board | None = None
        self._steps: Board | None = None
        self._done = 0  # the last epoch that was finished when the file was begun

    def begin(self) -> None:
        """See Tracker; the configuration becomes a text."""
        board = self._epochs()
        board.text("config", "```yaml\n" + self.run.config_path.read_text() + "```")
        board.flush()

    def steps(self, first: int, loss: Sequence[float | None], lr: Sequence[float | None]) -> None:
        """See Tracker; they are on disk when this returns. What earlier attempts plotted from the first call's `first`
        on is replaced."""
        if self._steps is None:
            self._steps = Board(self.run.tb / "steps", purge=first)
        for step, values in points(first, loss, lr):
            self._steps.points(step, values)
        self._steps.flush()

    def epoch(self, record: EpochRecord) -> None:
        """See Tracker."""
        board = self._epochs()
        if record.epoch > self._done:
            board.scalars(record.epoch, scalars(record))

    def end(self, status: str) -> None:
        """See Tracker; a run that is done becomes a row of the HPARAMS page."""
        if self._board is not None:
            if status == "done":
                self._hyperparameters()
            self._board.close()
        if self._steps is not None:
            self._steps.close()
        self._board = self._steps = None

    def take_warnings(self) -> list[str]:
        """None: errors are raised."""
        return []

    def _epochs(self) -> Board:
        if self._board is None:
            records = self.run.records()
            self._done = records[-1].epoch if records else 0
            self._board = Board(self.run.tb, purge=self._done)
            if records:  # the purge drops this epoch's points, and a killed attempt may not have written them
                self._board.scalars(self._done, scalars(records[-1]))
        return self._board

    def _hyperparameters(self) -> None:
        records = self.run.records()
        if not records:
            return
        config = self.run.config()
        hyperparameters = {
            "model": config.subject,
            "batch_size": config.batch_size,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "optimizer": config.optimizer.name,
            "schedule": config.schedule.name,
            "epochs": config.epochs,
            "seed": config.seed,
            "precision": config.precision,
            "reduction": config.reduction,
            "shards": config.shards,
            "num_workers": str(config.scaling.num_workers),
        }
        last = records[-1]
        metrics = {"hparam/val_loss": last.val_loss, **{f"hparam/{k}": v for k, v in last.metrics.items()}}
        write_hyperparameters(self.run.tb / "hparams", hyperparameters, metrics)


class Board:
    """One event file; its steps are epochs, or in tb/steps/ optimizer steps."""

    def __init__(self, folder: Path, purge: int | None = None, name: str | None = None) -> None:
        """Begin a file.

        Args:
            folder: where the file goes; made if it is missing.
            purge: make TensorBoard drop this step and later ones of earlier files; None: drop nothing.
            name: of the file; None: a new name that sorts after those of earlier files.

        Raises:
            WriteError: the file cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard sorts by name, so a later file needs a later name, even in the same second or if the clock is set.
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
        """Add a point to each curve; it is on disk when this returns."""
        for name, value in values.items():
            self.summary(step, scalar(name, value))
        self.flush()

    def points(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve; `flush` brings it to the disk."""
        named = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.summary(step, Summary(value=named))

    def text(self, tag: str, markdown: str) -> None:
        """Add a text in Markdown. Its step is the number of the attempt, since TensorBoard never drops a text."""
        self.summary(self.attempt, text(tag, markdown))

    def summary(self, step: int, summary: Any) -> None:
        """Add any TensorBoard summary."""
        self._write(step, summary=summary)

    def flush(self) -> None:
        """Return when everything is on disk."""
        with naming(self.path):
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with naming(self.path):
            self._file.close()

    def _write(self, step: int = 0, **fields: Any) -> None:
        with naming(self.path):
            self._file.write(Event(wall_time=time.time(), step=step, **fields).SerializeToString())


def graph_events(model: Any, example: tuple[Any, ...]) -> tuple[bytes, str]:
    """The bytes of an event file with a model's graph, and why there are none where the model cannot be traced. Imports
    torch.

    Args:
        model: a torch.nn.Module on the CPU.
        example: arguments of its `forward`.
    """
    file = _MemoryFile()
    folder = f"memory:{id(file)}"
    _in_memory[folder] = file
    try:
        # Tracing fails in many ways, and a missing graph must not fail a run.
        with warnings.catch_warnings(), SummaryWriter(folder) as board:
            warnings.simplefilter("ignore")
            board.add_graph(model, example)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return b"", f"{type(error).__name__}{': ' + lines[0][:200] if lines else ''}"
    finally:
        del _in_memory[folder]
    return bytes(file.data), ""


class _MemoryFile:
    """The file that tensorboardX writes in a folder `memory:...`: it uses no disk and leaves nothing behind."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class _MemoryFolders:
    @staticmethod
    def open(path: str) -> _MemoryFile:
        return _in_memory[path.rpartition("/")[0]]

    @staticmethod
    def directory_check(path: str) -> None:
        pass


_in_memory: dict[str, _MemoryFile] = {}
register_writer_factory("memory", _MemoryFolders)


def write_hyperparameters(folder: Path, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Write a row of TensorBoard's HPARAMS page; it replaces the content of the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    board = Board(folder, name=f"{FILE}0.hparams")  # a fixed name, so that copying the folder again replaces it
    for summary in hparams(dict(values), dict(metrics)):
        board.summary(0, summary)
    board.scalars(0, metrics)
    board.close()
