"""A run directory on disk: layout, atomic writes, and the references RUN@7, RUN@best, RUN@last.

    runs/<utc>-<name>-<4 hex>/
      run.json  config.yaml  data.json  epochs.jsonl  steps.jsonl  progress.json
      checkpoints/epoch_007/{state.safetensors, state.json}   checkpoints/step_00000123/   (inside an epoch)
      predictions/epoch_007.npz   tb/   logs/

Every file and every checkpoint directory is complete or absent (see disk.py). Nothing here knows torch or Ray.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from rayexp.config import ExperimentConfig, read
from rayexp.disk import directories, find_directory, make_directory, now, write_atomic, write_json
from rayexp.errors import UserError
from rayexp.locks import DRIVER, is_locked
from rayexp.records import EpochRecord, Predictions, RunRef

LAYOUT = 1
T = TypeVar("T")


def epoch_name(epoch: int) -> str:
    """`epoch_007`."""
    return f"epoch_{epoch:03d}"


def step_name(step: int) -> str:
    """`step_00000123`."""
    return f"step_{step:08d}"


def broken(checkpoint: Path) -> str | None:
    """Why a checkpoint directory cannot be used, or None where every file has the hash that state.json says."""
    try:
        wanted = json.loads((checkpoint / "state.json").read_bytes())["files"]
        for name, sha in wanted.items():
            with (checkpoint / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha:
                return f"{name} is damaged (sha256 {found[:12]}, expected {sha[:12]})"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@dataclass(frozen=True, slots=True)
class Run:
    """One run directory. Reading methods never write."""

    root: Path

    # ------------------------------------------------------------------ making and finding

    @classmethod
    def create(cls, config: ExperimentConfig, *, argv: builtins.list[str], parent: str | None = None) -> Run:
        """Make a fresh run directory under `config.storage_path`, with run.json (status `running`) and config.yaml.

        Raises:
            UserError: the directory cannot be made.
        """
        config = config.absolute()
        run = cls(make_directory(config.storage_path, config.name))
        write_atomic(run.config_path, config.to_yaml())
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
        write_json(run.meta_path, meta)
        return run

    @classmethod
    def find(cls, name: str, storage: Path) -> Run:
        """The run whose path, directory name, or unambiguous part of that name is `name`.

        Raises:
            UserError: none or several match, or the directory is no run or of a newer layout.
        """
        run = cls(find_directory(name, storage, "run.json", "run", "`rayexp runs` lists them; "))
        run.meta()
        return run

    @classmethod
    def all(cls, storage: Path) -> builtins.list[Run]:
        """All runs in a folder, oldest first."""
        return [cls(path) for path in directories(storage, "run.json")]

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
        """data.json: classes with their words and validation names, or the vocabulary."""
        return self.root / "data.json"

    @property
    def epochs_path(self) -> Path:
        """epochs.jsonl"""
        return self.root / "epochs.jsonl"

    @property
    def progress_path(self) -> Path:
        """progress.json: where a running epoch stands; rewritten about twice a second."""
        return self.root / "progress.json"

    @property
    def steps_path(self) -> Path:
        """steps.jsonl: for each epoch, what its steps took."""
        return self.root / "steps.jsonl"

    @property
    def stop_path(self) -> Path:
        """While this file is there, the workers are asked to save and stop after their current step."""
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
            UserError: not a run, damaged, or written by a newer rayexp.
        """
        try:
            meta = json.loads(self.meta_path.read_bytes())
            layout = meta["layout"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.meta_path}: not a run's description ({error})") from error
        if not isinstance(layout, int) or layout > LAYOUT:
            raise UserError(
                f"{self.meta_path}: layout {layout} is newer than this rayexp knows ({LAYOUT}); upgrade rayexp"
            )
        return dict(meta)

    def status(self) -> str:
        """`running`, `done`, `failed` or `stopped`; `died` where run.json says running and no driver holds its lock.

        Of a run on another host only what run.json says is known: not every shared file system shows its locks.
        """
        meta = self.meta()
        if meta["status"] == "running" and meta.get("host") == socket.gethostname() and not self._driven(meta):
            return "died"
        return str(meta["status"])

    def _driven(self, meta: Mapping[str, Any]) -> bool:
        if (self.root / DRIVER).exists():
            return is_locked(self.root)
        # Not locked yet, or a copy: then the process is all there is to go by.
        return not isinstance(meta.get("pid"), int) or psutil.pid_exists(meta["pid"])

    def config(self) -> ExperimentConfig:
        """The resolved configuration."""
        return read(self.config_path)

    def data(self) -> dict[str, Any]:
        """data.json.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            return dict(json.loads(self.data_path.read_bytes()))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.data_path}: cannot be read ({error})") from error

    def records(self) -> builtins.list[EpochRecord]:
        """The finished epochs in order; a line that a crash left unfinished is passed over."""
        return _read_lines(self.epochs_path, EpochRecord.from_json)

    def steps(self) -> builtins.list[dict[str, Any]]:
        """What the steps of each epoch took, in order: `epoch`, `first` (whether the first of them was its process's
        first), and lists with one number a step: `count` (samples), `total` and the phases in seconds."""
        return _read_lines(self.steps_path, dict)

    def epochs(self) -> builtins.list[int]:
        """The epochs that have a checkpoint, in order."""
        found = (path.name.removeprefix("epoch_") for path in self.checkpoints.glob("epoch_*"))
        return sorted(int(text) for text in found if text.isdecimal())

    def best(self) -> int:
        """The epoch with the smallest validation loss (images: the highest acc1), the earliest of equals.

        Raises:
            UserError: no epoch is finished.
        """
        records = [r for r in self.records() if r.val_loss == r.val_loss]
        if not records:
            raise UserError(f"{self.root}: no epoch has finished, so there is no best one")
        return min(records, key=lambda r: (-r.metrics["acc1"] if "acc1" in r.metrics else r.val_loss, r.epoch)).epoch

    def epoch(self, ref: int | str) -> int:
        """The number behind `7`, `best` or `last`.

        Raises:
            UserError: there is no such epoch; the line lists those that are.
        """
        if ref == "best":
            return self.best()
        have = sorted({*self.epochs(), *(r.epoch for r in self.records())})
        if not have:
            raise UserError(f"{self.root}: no epoch has finished")
        if ref == "last":
            return have[-1]
        if ref not in have:
            raise UserError(f"{self.id}@{ref}: no such epoch; there are {_ranges(have)}")
        return int(ref)

    def predictions(self, epoch: int) -> Predictions:
        """What the model said after that epoch.

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
        """Checkpoints (of epochs and of steps) with their state.json, the most advanced first; whole or not."""
        found = []
        for path in self.checkpoints.glob("[es]*_*"):
            try:
                state = json.loads((path / "state.json").read_bytes())
                # After an epoch's last step both may be there; the epoch's own counts as the later.
                found.append((int(state["step"]), path.name.startswith("epoch_"), path, state))
            except (OSError, ValueError, KeyError, TypeError):
                digits = path.name.split("_")[1]
                found.append((-1, False, path, {"unreadable": digits}))
        for _, _, path, state in sorted(found, key=lambda f: f[:2], reverse=True):
            yield path, state

    # ------------------------------------------------------------------ the little that drivers write

    def update(self, **fields: Any) -> None:
        """Set fields of run.json."""
        write_json(self.meta_path, {**self.meta(), **fields})


def resolve(text: str, storage: Path) -> tuple[Run, int]:
    """`RUN@7`, `RUN@best`, `RUN@last` or `RUN` as a run and the number of an epoch (UserError where there is none)."""
    ref = RunRef.parse(text)
    run = Run.find(ref.run, storage)
    return run, run.epoch(ref.epoch)


def _read_lines(path: Path, make: Callable[[Any], T]) -> list[T]:
    """One value a line of JSON; a last line that a crash left unfinished is passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(make(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is damaged ({error})") from error
    return rows


def _ranges(numbers: list[int]) -> str:
    """`1-4, 7`."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][-1] == n - 1:
            parts[-1][-1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in parts)
