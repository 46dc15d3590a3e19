"""Bring a run home: records, predictions, checkpoints, from wherever `sources` finds it.

The copy is made in an order that leaves nothing half: every file and every checkpoint under a temporary name, checked,
then renamed; run.json last, so an unfinished copy is no run yet. The same command goes on where it was cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rayexp.disk import TEMPORARY, naming, now, sync_directory, write_atomic, write_json
from rayexp.errors import RunError, UserError
from rayexp.launch.sources import Source, Storage, below
from rayexp.records import Predictions
from rayexp.runs import Run, broken, epoch_name

MARK = "collected.json"  # says that a run directory is a copy, and of what
RECORDS = ("config.yaml", "data.json", "steps.jsonl", "trace.jsonl")  # where they are there
WORDS = "state.json"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collect did: the copy, the epochs it has checkpoints of now, those fetched, bytes fetched."""

    run: Run
    epochs: list[int]
    fetched: list[int]
    size: int


def collect(source: Source, name: str, to: Path, epochs: str = "all", say: Say = lambda text: None) -> Collected:
    """Copy a run to `to`/`name`, or bring such a copy up to date.

    Args:
        source: see `find`.
        name: the run's id.
        epochs: whose checkpoints: `all`, `none`, or numbers, ranges and `last`, such as `7,18` and `1-3,last`.
        say: told what is being fetched.

    Raises:
        UserError: `epochs` names one that is not there, or `to` holds the run itself and no copy of it.
        RunError: the source cannot be read, or a file of it is damaged; what is whole has been brought.
    """
    return _Copy(source, Run(to.expanduser().resolve() / name), say).make(epochs)


def upload(run: Run, uri: str, say: Say = lambda text: None) -> str:
    """Copy a run to an object store (s3://, gs://, file://); returns where it lies.

    Objects are whole or absent by themselves; state.json ends each checkpoint and run.json the run. What is already
    there with the same content is left.

    Raises:
        UserError: no storage there. RunError: it cannot be written, or reads back otherwise.
    """
    storage = Storage(below(uri, run.id))
    names = [str(p.relative_to(run.root)) for p in run.root.rglob("*") if p.is_file() and not p.name.startswith(".")]
    last = {"run.json": 2, WORDS: 1}
    for name in sorted(names, key=lambda n: (last.get(Path(n).name, 0), n)):
        sha = _sha(run.root / name)
        if storage.sha(name) != sha:
            say(f"writing {name}")
            storage.write(name, run.root / name)
            if storage.sha(name) != sha:
                raise RunError(f"{storage.name}/{name} does not read back as it was written")
    return storage.name


class _Copy:
    def __init__(self, source: Source, run: Run, say: Say) -> None:
        self.source, self.run, self.say = source, run, say
        self.size = 0
        self.faults: list[str] = []

    def make(self, epochs: str) -> Collected:
        # In this order: what run.json says is true of epochs.jsonl, and all that a line there stands for is complete.
        meta = self._bytes("run.json")
        lines = self._bytes("epochs.jsonl") if "epochs.jsonl" in (there := self.source.list("")) else b""
        rows = self._rows(meta, lines)
        saved = {n.rstrip("/") for n in self.source.list("checkpoints")}
        wanted = self._wanted(epochs, rows, [e for e in rows if epoch_name(e) in saved])
        self._claim()
        known = {r.epoch: r.weights_sha for r in self.run.records()}
        for file in there:
            if file in RECORDS:
                write_atomic(self.run.root / file, self._bytes(file))
        fetched = []
        for epoch, sha in rows.items():
            self._attempt(epoch, lambda e=epoch, s=sha: self._predictions(e, known.get(e) == s))  # type: ignore[misc]
            if epoch in wanted and self._attempt(epoch, lambda e=epoch: self._checkpoint(e)):  # type: ignore[misc]
                fetched.append(epoch)
        self._tree("tb/")
        self._tree("logs/")
        if self.faults:
            raise RunError(f"{self.source.name}: {'; '.join(self.faults)}; all else of {self.run.root} is whole")
        write_atomic(self.run.epochs_path, lines)
        write_atomic(self.run.meta_path, meta)
        return Collected(self.run, self.run.epochs(), fetched, self.size)

    def _claim(self) -> None:
        """The folder is a copy's or new; never the run itself, into which someone may be writing."""
        if self.run.meta_path.exists() and not (self.run.root / MARK).exists():
            raise UserError(f"{self.run.root} is the run itself, not a copy of it; --to DIR puts a copy elsewhere")
        write_json(self.run.root / MARK, {"source": self.source.name, "at": now()})

    def _rows(self, meta: bytes, lines: bytes) -> dict[int, str]:
        """Epochs with their weights_sha; checks that this rayexp can read the run."""
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder))
            run.meta_path.write_bytes(meta)
            run.epochs_path.write_bytes(lines)
            run.meta()
            return {r.epoch: r.weights_sha for r in run.records()}

    def _wanted(self, words: str, rows: Mapping[int, str], saved: list[int]) -> set[int]:
        if words in ("all", "none"):
            return set(saved) if words == "all" else set()
        wanted = set()
        for word in words.split(","):
            first, dash, last = word.strip().partition("-")
            if word.strip() == "last":
                wanted.add(saved[-1] if saved else 0)
            elif first.isdecimal() and (last.isdecimal() or not dash):
                wanted |= set(range(int(first), int(last or first) + 1))
            else:
                raise UserError(f"--epochs {words}: expected all, none, or numbers such as 7,18 or 1-3,last")
        if missing := sorted(wanted - set(saved)):
            there = ", ".join(map(str, saved)) or "none"
            raise UserError(f"--epochs: no checkpoint of {', '.join(map(str, missing))}; there are {there}")
        return wanted

    def _attempt(self, epoch: int, action: Callable[[], bool]) -> bool:
        """One damaged file must not keep the others back."""
        try:
            return action()
        except (_DamagedError, UserError) as error:
            self.faults.append(f"epoch {epoch}: {error}")
            return False

    def _predictions(self, epoch: int, same: bool) -> bool:
        target = self.run.predictions_path(epoch)
        path = f"predictions/{target.name}"
        if same and target.exists():
            return False
        data = self._bytes(path)
        Predictions.from_npz(data, path)
        write_atomic(target, data)
        return True

    def _checkpoint(self, epoch: int) -> bool:
        target = self.run.checkpoint(epoch)
        folder = f"checkpoints/{target.name}"
        words = self._bytes(f"{folder}/{WORDS}")
        if (target / WORDS).exists() and (target / WORDS).read_bytes() == words and not broken(target):
            return False
        try:
            files = dict(json.loads(words)["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise _DamagedError(f"{folder}/{WORDS} is damaged ({error})") from error
        # Always the same name, so that whole files in it are found again after a break.
        temporary = target.with_name(f"{TEMPORARY}{target.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        for file, sha in files.items():
            if file != Path(file).name or file.startswith("."):
                raise _DamagedError(f"{folder}/{WORDS} names a file outside: {file!r}")
            if not (temporary / file).exists() or _sha(temporary / file) != sha:
                self.say(f"fetching {folder}/{file}")
                self._file(f"{folder}/{file}", temporary / file, sha)
        write_atomic(temporary / WORDS, words)
        _into_place(temporary, target)
        return True

    def _tree(self, folder: str) -> None:
        for name in self.source.list(folder.rstrip("/")):
            if name.startswith((TEMPORARY, ".")):
                continue
            if name.endswith("/"):
                self._tree(folder + name)
            else:
                self._file(folder + name, self.run.root / folder / name)

    # ------------------------------------------------------------------ reading

    def _bytes(self, path: str) -> bytes:
        data = b"".join(self.source.read(path))
        self.size += len(data)
        return data

    def _file(self, path: str, target: Path, sha: str | None = None) -> None:
        temporary = target.with_name(f"{TEMPORARY}{target.name}")
        digest = hashlib.sha256()
        try:
            with naming(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                file = temporary.open("wb")
            with file:
                for piece in self.source.read(path):
                    with naming(target):
                        file.write(piece)
                    digest.update(piece)
                    self.size += len(piece)
                with naming(target):
                    file.flush()
                    os.fsync(file.fileno())
            if sha and digest.hexdigest() != sha:
                raise _DamagedError(f"{path} is damaged (sha256 {digest.hexdigest()[:12]}, expected {sha[:12]})")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


class _DamagedError(Exception):
    """A file at the source is not what its hash says."""


def _into_place(temporary: Path, target: Path) -> None:
    """Rename a whole directory to its name; an old one of that name goes."""
    old = temporary.with_name(temporary.name + "-old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    temporary.replace(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
