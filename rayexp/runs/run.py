"""A run directory on disk: layout, atomic writes, and the references RUN@7, RUN@best, RUN@last.

    runs/<utc>-<name>-<4 hex>/
      run.json  config.yaml  data.json  epochs.jsonl  metrics.csv  steps.jsonl  progress.json
      checkpoints/epoch_007/{state.safetensors, state.json}   checkpoints/step_00000123/   (inside an epoch)
      predictions/epoch_007.npz   tb/   logs/   code/

Every file and every checkpoint directory is complete or absent (see disk.py). Nothing here knows torch or Ray.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rayexp.config import ExperimentConfig, read
from rayexp.config.code import FOLDER, read_code
from rayexp.errors import UserError
from rayexp.runs.code import keep_code
from rayexp.runs.manifest import broken, digest, file_fault, read_meta
from rayexp.runs.newest import newest_first
from rayexp.runs.records import EpochRecord, Predictions, best, one_line, ranges, read_lines, reference, step_line
from rayexp.runs.table import columns, to_pandas
from rayexp.runs.traits import Goal, traits_of
from rayexp.system.disk import directories, find_directory, make_directory, now, write_atomic, write_json
from rayexp.system.locks import DRIVER, is_locked

__all__ = ["Run", "broken", "epoch_name", "resolve", "step_name"]

LAYOUT = 1
_UPDATING = threading.Lock()  # training notes things while an epoch is written in the background


def epoch_name(epoch: int) -> str:
    """`epoch_007`."""
    return f"epoch_{epoch:03d}"


def step_name(step: int) -> str:
    """`step_00000123`."""
    return f"step_{step:08d}"


@dataclass(frozen=True, slots=True)
class Run:
    """One run directory. Reading methods never write."""

    root: Path

    # ------------------------------------------------------------------ making and finding

    @classmethod
    def create(cls, config: ExperimentConfig, *, argv: builtins.list[str], parent: str | None = None) -> Run:
        """Make a fresh run directory under `config.storage_path`, with run.json (status `running`) and config.yaml.

        Raises:
            UserError: the directory cannot be made, or code that is to travel is not there.
        """
        config = config.absolute()
        files = read_code(config.code)
        run, text = cls(make_directory(config.storage_path, config.name)), config.to_yaml(FOLDER)
        meta = {
            "layout": LAYOUT,
            "id": run.root.name,
            "name": config.name,
            "workload": config.workload,
            "status": "running",
            "error": None,
            "created": now(),
            "argv": argv,
            "parent": parent,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        try:
            code = keep_code(run.root, files)
            write_atomic(run.config_path, text)
            write_json(run.meta_path, {**meta, **code, "files": {"config.yaml": digest(text.encode())}})
        except BaseException:
            shutil.rmtree(run.root, ignore_errors=True)
            raise
        return run

    @classmethod
    def find(cls, name: str, storage: Path) -> Run:
        """The run with this path, directory name or run name, or with a directory name that contains `name`.

        Raises:
            UserError: none or several match, or the directory is no run or of a newer layout.
        """
        run = cls.locate(name, storage)
        run.meta()
        return run

    @classmethod
    def locate(cls, name: str, storage: Path) -> Run:
        """Like `find`, but the run may be damaged."""
        return cls(find_directory(name, storage, "run.json", "run", "`rayexp runs` lists them; "))

    @classmethod
    def open(cls, ref: str | Path, runs: str | Path = "runs") -> Run:
        """The run that `ref` names, as on the command line: a path, a name, or a checkpoint (`RUN@best`), whose run it
        is (UserError: there is none)."""
        run = reference(str(ref)).run
        return cls.find(run, Path(runs)) if run == str(ref) else resolve(str(ref), Path(runs))[0]

    @classmethod
    def all(cls, storage: Path) -> builtins.list[Run]:
        """All runs in a folder, oldest first, including those whose run.json cannot be read."""
        return [cls(path) for path in directories(storage, "run.json")]

    @classmethod
    def readable(cls, storage: Path) -> builtins.list[Run]:
        """The runs in a folder whose run.json can be read, oldest first."""
        found = []
        for run in cls.all(storage):
            with contextlib.suppress(UserError):
                run.meta()
                found.append(run)
        return found

    # ------------------------------------------------------------------ the layout

    @property
    def id(self) -> str:
        """The directory's name."""
        return self.root.name

    @property
    def meta_path(self) -> Path:
        """run.json"""
        return self.root / "run.json"

    @property
    def config_path(self) -> Path:
        """config.yaml"""
        return self.root / "config.yaml"

    @property
    def data_path(self) -> Path:
        """data.json: the classes and the names of the validation images, or the vocabulary."""
        return self.root / "data.json"

    @property
    def epochs_path(self) -> Path:
        """epochs.jsonl"""
        return self.root / "epochs.jsonl"

    @property
    def progress_path(self) -> Path:
        """progress.json: how far the current epoch is; rewritten about twice a second."""
        return self.root / "progress.json"

    @property
    def steps_path(self) -> Path:
        """steps.jsonl: for each epoch, the loss and the rate of its steps, and how long they took."""
        return self.root / "steps.jsonl"

    @property
    def stop_path(self) -> Path:
        """stop: while this file exists, it asks the workers to save and stop after their current step."""
        return self.root / "stop"

    @property
    def logs(self) -> Path:
        """logs/"""
        return self.root / "logs"

    @property
    def tb(self) -> Path:
        """tb/: TensorBoard's event files."""
        return self.root / "tb"

    @property
    def checkpoints(self) -> Path:
        """checkpoints/"""
        return self.root / "checkpoints"

    def checkpoint(self, epoch: int) -> Path:
        """checkpoints/epoch_007"""
        return self.checkpoints / epoch_name(epoch)

    def predictions_path(self, epoch: int) -> Path:
        """predictions/epoch_007.npz"""
        return self.root / "predictions" / f"{epoch_name(epoch)}.npz"

    # ------------------------------------------------------------------ reading

    def meta(self) -> dict[str, Any]:
        """run.json, upgraded to this layout.

        Raises:
            UserError: it is not a run, is damaged, or was written by a newer rayexp.
        """
        return read_meta(self.meta_path, LAYOUT)

    def status(self) -> str:
        """`running`, `done`, `failed` or `stopped`; `died` where run.json says running but no driver holds the lock.

        For a run on another host this is what run.json says: not every shared file system shows another host's locks.
        """
        meta = self.meta()
        if meta["status"] == "running" and meta.get("host") == socket.gethostname() and not self._has_driver(meta):
            return "died"
        return str(meta["status"])

    def _has_driver(self, meta: Mapping[str, Any]) -> bool:
        if (self.root / DRIVER).exists():
            return is_locked(self.root)
        # Not locked yet, or a copy of a run: only the process can tell.
        return not isinstance(meta.get("pid"), int) or psutil.pid_exists(meta["pid"])

    def config(self) -> ExperimentConfig:
        """The resolved configuration.

        Raises:
            UserError: it is missing or damaged, or not what the run wrote.
        """
        self._check("config.yaml")
        return read(self.config_path)

    def data(self) -> dict[str, Any]:
        """data.json.

        Raises:
            UserError: it is missing or damaged, or not what the run wrote.
        """
        self._check("data.json")
        try:
            return dict(json.loads(self.data_path.read_bytes()))
        except (OSError, ValueError, RecursionError, TypeError) as error:
            raise UserError(f"{self.data_path}: cannot be read ({one_line(error)})") from error

    def _check(self, name: str) -> None:
        if why := self.fault(name):
            raise UserError(f"{self.root / name}: {why}")

    def records(self) -> builtins.list[EpochRecord]:
        """The records of the finished epochs, in order; a line that a crash left unfinished is skipped.

        Raises:
            UserError: a line is damaged, or the file cannot be read.
        """
        return read_lines(self.epochs_path, EpochRecord.from_json)

    def steps(self) -> builtins.list[dict[str, Any]]:
        """The steps of each epoch, in order: `epoch`; `loss` (the step's mean) and `lr`, a number for each step, None
        where an older rayexp did not note it; and of the steps since the epoch's last resume `count` (samples), `total`
        and the phases (seconds), and `first`: whether the first of them was the first one of its process. Lines of an
        older rayexp have no `loss` and no `lr`."""
        return read_lines(self.steps_path, step_line)

    def epochs(self) -> builtins.list[int]:
        """The epochs that have a checkpoint, in order."""
        found = (path.name.removeprefix("epoch_") for path in self.checkpoints.glob("epoch_*"))
        return sorted(int(text) for text in found if text.isdecimal())

    def best(self) -> int:
        """The best epoch by the first of the goals, the earliest of equals (see records.best).

        Raises:
            UserError: no epoch is finished, or none has a finite loss.
        """
        records = self.records()
        if not records:
            raise UserError(f"{self.root}: no epoch has finished, so there is no best one")
        found = best(records, self.goals())
        if found is None:
            epochs = ranges(sorted(r.epoch for r in records))
            raise UserError(f"{self.id}@best: no finite validation loss in epochs {epochs}, so there is no best one")
        return found.epoch

    def epoch(self, ref: int | str) -> int:
        """The number of the epoch that `7`, `best` or `last` refers to.

        Raises:
            UserError: there is no such epoch; the line lists those that exist.
        """
        if ref == "best":
            return self.best()
        have = sorted({*self.epochs(), *(r.epoch for r in self.records())})
        if not have:
            raise UserError(f"{self.root}: no epoch has finished")
        if ref == "last":
            return have[-1]
        if ref not in have:
            raise UserError(f"{self.id}@{ref}: no such epoch; there are {ranges(have)}")
        return int(ref)

    def at(self, epoch: int | str) -> str:
        """A reference to a checkpoint of this run, from its number, `best` or `last`; see `epoch`."""
        return f"{self.root}@{self.epoch(epoch)}"

    def table(self) -> dict[str, builtins.list[Any]]:
        """The finished epochs by column; see table.columns."""
        return columns(self.records())

    def to_pandas(self) -> Any:
        """The same as a pandas.DataFrame, one row for each epoch (UserError: pandas is not installed)."""
        return to_pandas(self.records())

    def predictions(self, epoch: int) -> Predictions:
        """The model's predictions after that epoch.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.predictions_path(epoch)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); `rayexp evaluate` makes it") from error
        return Predictions.from_npz(data, str(path))

    def resumable(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """All checkpoints (of epochs and of steps) with the content of their state.json, newest first, damaged or not.

        The order comes from the directories' names; the content is empty where a state.json cannot be read.
        """
        return newest_first(self.checkpoints)

    def files(self) -> dict[str, str]:
        """The manifest in run.json: name -> sha256; empty where an older rayexp made the run."""
        files = self.meta().get("files")
        return dict(files) if isinstance(files, dict) else {}

    def fault(self, name: str) -> str | None:
        """What is wrong with config.yaml, data.json, epochs.jsonl or steps.jsonl (see manifest.file_fault), or None."""
        try:
            return file_fault((self.root / name).read_bytes(), name, self.files())
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    def stepping(self) -> bool:
        """Whether the current attempt has done a step: progress.json then names it (before, it may hold warnings)."""
        try:
            return "step" in json.loads(self.progress_path.read_bytes())
        except (OSError, ValueError, TypeError):
            return False

    # ------------------------------------------------------------------ what the workload says of it

    def unit(self) -> str:
        """What throughput counts: `images`, `tokens`, `samples`."""
        return traits_of(self.meta()).unit

    def kind(self) -> str:
        """The kind of its predictions: `images`, `tokens` or `samples` (see records.Predictions)."""
        return traits_of(self.meta()).kind

    def goals(self) -> Mapping[str, Goal]:
        """Its metrics in the order in which they are shown, and whether `max` or `min` is better; the first decides
        which epoch is the best. The validation loss is always known."""
        return traits_of(self.meta()).goals

    # ------------------------------------------------------------------ writing, for drivers

    def update(self, **fields: Any) -> None:
        """Set fields of run.json."""
        with _UPDATING:
            write_json(self.meta_path, {**self.meta(), **fields})

    def write(self, name: str, data: str) -> None:
        """Write a file that the manifest covers.

        The manifest does not name the file while it is replaced, so that a crash in between leaves it uncovered rather
        than seemingly damaged.
        """
        files, sha = self.files(), digest(data.encode())
        if files.get(name, sha) != sha:
            self.uncover(name)
        write_atomic(self.root / name, data)
        if files.get(name) != sha:
            self.update(files={**self.files(), name: sha})

    def uncover(self, *names: str) -> None:
        """Remove files from the manifest, because they are about to change."""
        files = self.files()
        if files.keys() & set(names):
            self.update(files={name: sha for name, sha in files.items() if name not in names})


def resolve(text: str, storage: Path) -> tuple[Run, int]:
    """The run and the epoch that `RUN@7`, `RUN@best`, `RUN@last` or `RUN` refers to (UserError where there is none)."""
    ref = reference(text)
    run = Run.find(ref.run, storage)
    return run, run.epoch(ref.epoch)
