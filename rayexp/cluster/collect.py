"""Copy a run from wherever `sources` finds it: records, predictions, logs, and the checkpoints that are asked for.

Nothing is ever half there: every file and every checkpoint is written under a temporary name, checked and renamed, and
run.json comes last, so an unfinished copy is not yet a run. The same command continues a copy that was interrupted.

The source is not trusted: a file whose hash is not the one in the run's manifest is not taken, and a name that leads
outside the copy is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rayexp.cluster.sources import RunSource, Storage, below
from rayexp.config.code import FOLDER
from rayexp.errors import RunError, UserError
from rayexp.runs.code import hashes_of
from rayexp.runs.integrity import RECORDS, described, faults, predictions_fault
from rayexp.runs.manifest import state_fault
from rayexp.runs.records import EpochRecord
from rayexp.runs.retention import NOTE, reason
from rayexp.runs.run import Run, broken, epoch_name
from rayexp.system.disk import TEMPORARY, inside, naming, now, relative, sync_directory, write_atomic, write_json
from rayexp.system.locks import PATIENCE_S, HeldError, locked

MARK = "collected.json"  # marks a run directory as a copy, and says of what
LOCK = ".collecting"  # is held, and there, while a copy is made
EPOCHS, TRACE, STATE = "epochs.jsonl", "trace.jsonl", "state.json"
# The deepest nesting and the most files in tb/, logs/ or trackers/; more is a listing that contains itself.
MAX_DEPTH, MAX_FILES = 8, 10_000
ATTEMPTS = 3  # where the run goes on while it is read
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` did.

    Attributes:
        run: the copy.
        epochs: those whose checkpoints it now has.
        fetched: those whose checkpoints were fetched this time.
        size: bytes fetched.
    """

    run: Run
    epochs: list[int]
    fetched: list[int]
    size: int


def collect(source: RunSource, name: str, to: Path, epochs: str = "all", say: Say = lambda text: None) -> Collected:
    """Copy a run to `to`/`name`, or bring such a copy up to date.

    Args:
        source: see `sources.find`.
        name: the run's id.
        epochs: whose checkpoints: `all`, `none`, or numbers, ranges and `last`, such as `7,18` and `1-3,last`.
        say: told what is being fetched.

    Raises:
        UserError: `epochs` names one that is not there, or `to` holds the run itself and no copy of it.
        RunError: the source cannot be read, or a file of it is damaged; what is whole has been brought.
    """
    if len(relative(name).parts) != 1:
        raise UserError(f"{name!r}: not a run's name; refused")
    run = Run(to.expanduser().resolve() / name)
    for _ in range(ATTEMPTS):
        copy = _Copy(source, run, say)
        got = copy.make(epochs)
        if not copy.faults or not copy.outdated():
            break
    if copy.faults:
        raise RunError(f"{source.name}: {'; '.join(copy.faults)}; all else of {run.root} is whole")
    if found := faults(run):
        raise RunError(f"{source.name}: {'; '.join(found)}; {run.root} is a true copy of it")
    return got


def upload(run: Run, uri: str, say: Say = lambda text: None) -> str:
    """Copy a run to an object store (s3://, gs://, file://); returns its URI.

    An object is whole or absent by itself; each checkpoint's state.json comes after its tensors, and run.json last.
    Objects that are there already with the same content are left alone.

    Raises:
        UserError: there is no such storage. RunError: it cannot be written, or reads back otherwise.
    """
    storage = Storage(below(uri, run.id))
    names = [str(p.relative_to(run.root)) for p in run.root.rglob("*") if p.is_file() and not p.name.startswith(".")]
    last = {"run.json": 2, STATE: 1}
    for name in sorted(names, key=lambda n: (last.get(Path(n).name, 0), n)):
        sha = _sha(run.root / name)
        if storage.sha(name) != sha:
            say(f"writing {name}")
            storage.write(name, run.root / name)
            if storage.sha(name) != sha:
                raise RunError(f"{storage.name}/{name} does not read back as it was written")
    return storage.name


class _Copy:
    def __init__(self, source: RunSource, run: Run, say: Say) -> None:
        self.source, self.run, self.say = source, run, say
        self.size = 0
        self.meta = b""
        self.faults: list[str] = []
        self.damaged: set[str] = set()  # of the files at the top

    def make(self, epochs: str) -> Collected:
        # In this order: what run.json says is true of epochs.jsonl, and all that a line there stands for is complete.
        self.meta = self._bytes("run.json")
        there = self.source.list("")
        files = {name: self._bytes(name) for name in (*RECORDS, TRACE) if name in there}
        rows = self._rows(files)
        saved = {n.rstrip("/") for n in self.source.list("checkpoints")}
        wanted = self._wanted(epochs, rows, [e for e in rows if epoch_name(e) in saved])
        with self._claimed():
            return self._fill(files, rows, wanted)

    def _fill(self, files: Mapping[str, bytes], rows: Mapping[int, EpochRecord], wanted: set[int]) -> Collected:
        for name, data in files.items():
            if name not in self.damaged and name != EPOCHS:
                self._attempt(name, lambda n=name, d=data: write_atomic(self._target(n), d))  # type: ignore[misc]
        for name, sha in hashes_of(json.loads(self.meta)).items():
            self._attempt(f"{FOLDER}/{name}", lambda n=name, s=sha: self._code(n, s))  # type: ignore[misc]
        fetched = []
        for epoch, row in rows.items():
            self._attempt(f"epoch {epoch}", lambda r=row: self._predictions(r))  # type: ignore[misc]
            if epoch in wanted and self._attempt(f"epoch {epoch}", lambda e=epoch: self._present(e)):  # type: ignore[misc]
                fetched.append(epoch)
        for folder in ("tb", "logs", "trackers"):
            self._attempt(f"{folder}/", lambda f=folder: self._tree(f))  # type: ignore[misc]
        if not self.faults:
            write_atomic(self.run.epochs_path, files.get(EPOCHS, b""))
            write_atomic(self.run.meta_path, self.meta)
        return Collected(self.run, self.run.epochs(), fetched, self.size)

    def outdated(self) -> bool:
        """Whether the run has gone on since run.json was read; then a file that seemed damaged may just be newer."""
        return self._bytes("run.json") != self.meta

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """Mark the folder as a copy, and let nobody else write into it while the block runs.

        Raises:
            UserError: another process collects the run into it; or it is the run itself, into which someone may be
                writing.
        """
        if self.run.meta_path.exists() and not (self.run.root / MARK).exists():
            raise UserError(f"{self.run.root} is the run itself, not a copy of it; --to DIR puts a copy elsewhere")
        write_json(self.run.root / MARK, {"source": self.source.name, "at": now()})
        lock = self.run.root / LOCK
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(lock, PATIENCE_S))
            except HeldError:
                raise UserError(f"{self.run.root}: another process is collecting it") from None
            stack.callback(lock.unlink, missing_ok=True)
            yield

    def _rows(self, files: Mapping[str, bytes]) -> dict[int, EpochRecord]:
        """The records by epoch. Checks that this rayexp can read the run, and its top-level files by the manifest."""
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder))
            run.meta_path.write_bytes(self.meta)
            for name, data in files.items():
                (run.root / name).write_bytes(data)
            run.meta()
            for finding in described(run):
                if finding.state == "damaged":
                    self.damaged.add(finding.what)
                    self.faults.append(str(finding))
            try:
                return {record.epoch: record for record in run.records()}
            except UserError:
                return {}  # one of the faults

    def _wanted(self, asked: str, rows: Mapping[int, EpochRecord], saved: list[int]) -> set[int]:
        """The epochs whose checkpoints are asked for (UserError: no such checkpoint, or not a list of epochs)."""
        if asked in ("all", "none"):
            return set(saved) if asked == "all" else set()
        wanted = set()
        for item in asked.split(","):
            first, dash, last = item.strip().partition("-")
            if item.strip() == "last":
                wanted.add(saved[-1] if saved else 0)
            elif first.isdecimal() and (last.isdecimal() or not dash):
                wanted |= set(range(int(first), int(last or first) + 1))
            else:
                raise UserError(f"--epochs {asked}: expected all, none, or numbers such as 7,18 or 1-3,last")
        if missing := sorted(wanted - set(saved)):
            there = ", ".join(map(str, saved)) or "none"
            gone = self._not_kept()
            why = next((f" ({reason(gone[str(epoch)])})" for epoch in missing if str(epoch) in gone), "")
            raise UserError(f"--epochs: no checkpoint of {', '.join(map(str, missing))}{why}; there are {there}")
        return wanted

    def _attempt(self, what: str, action: Callable[[], bool | None]) -> bool:
        """Do `action`; note a damaged file, so that it does not keep the others back."""
        try:
            return bool(action())
        except (_DamagedError, UserError) as error:
            self.faults.append(f"{what}: {error}")
            return False

    def _target(self, path: str) -> Path:
        """The path of a run's file in the copy; all that is written passes here (UserError: it leads outside)."""
        return inside(self.run.root, path)

    def _code(self, name: str, sha: str) -> bool:
        target = self._target(f"{FOLDER}/{name}")
        if target.exists() and _sha(target) == sha:
            return False
        self._file(f"{FOLDER}/{name}", target, sha)
        return True

    def _predictions(self, row: EpochRecord) -> bool:
        path = f"predictions/{self.run.predictions_path(row.epoch).name}"
        target = self._target(path)
        known = {r.epoch: r.weights_sha for r in self.run.records()}.get(row.epoch)
        if target.exists() and known == row.weights_sha and not predictions_fault(target, row):
            return False
        temporary = target.with_name(f"{TEMPORARY}{target.name}")
        try:
            self._file(path, temporary)
            if why := predictions_fault(temporary, row):
                raise _DamagedError(f"{path}: {why}")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _not_kept(self) -> dict[str, str]:
        """What the source's run.json says of removed checkpoints."""
        found = json.loads(self.meta).get(NOTE)
        return dict(found) if isinstance(found, dict) else {}

    def _present(self, epoch: int) -> bool:
        """Fetch a checkpoint, unless the run has gone on meanwhile and does not keep it any more."""
        try:
            return self._checkpoint(epoch)
        except RunError:
            if epoch_name(epoch) in {name.rstrip("/") for name in self.source.list("checkpoints")}:
                raise
            shutil.rmtree(self._target(f"checkpoints/{TEMPORARY}{epoch_name(epoch)}"), ignore_errors=True)
            self.say(f"checkpoints/{epoch_name(epoch)}: removed while it was fetched")
            return False

    def _checkpoint(self, epoch: int) -> bool:
        folder = f"checkpoints/{epoch_name(epoch)}"
        target = self._target(folder)
        data = self._bytes(f"{folder}/{STATE}")
        if (target / STATE).exists() and (target / STATE).read_bytes() == data and not broken(target):
            return False
        try:
            state = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _DamagedError(f"{folder}/{STATE} is damaged ({error})") from error
        if why := state_fault(state, target.name):
            raise _DamagedError(f"{folder}/{STATE} is damaged ({why})")
        # Always the same name, so that files in it are found again after an interruption.
        temporary = target.with_name(f"{TEMPORARY}{target.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        for file, sha in state["files"].items():
            try:
                part = inside(temporary, file)
            except UserError:
                raise _DamagedError(f"{folder}/{STATE} names a file outside: {file!r}") from None
            if not part.exists() or _sha(part) != sha:
                self.say(f"fetching {folder}/{file}")
                self._file(f"{folder}/{file}", part, sha)
        write_atomic(temporary / STATE, data)
        _replace_directory(temporary, target)
        return True

    def _tree(self, folder: str) -> None:
        for number, path in enumerate(self._below(folder)):
            if number == MAX_FILES:
                raise _DamagedError(f"more than {MAX_FILES:,} files: it contains itself; refused")
            self._file(path, self._target(path))

    def _below(self, folder: str, depth: int = 1) -> Iterator[str]:
        """The paths of all files in a folder of the source and its subfolders."""
        if depth > MAX_DEPTH:
            raise _DamagedError(f"{folder}/ is {depth} folders deep: it contains itself; refused")
        for name in self.source.list(folder):
            if name.startswith((TEMPORARY, ".")) and ".." not in name:
                continue
            if len(relative(name).parts) != 1:
                raise _DamagedError(f"{folder}/ lists {name!r}, which is no name in it; refused")
            if name.endswith("/"):
                yield from self._below(f"{folder}/{name.removesuffix('/')}", depth + 1)
            else:
                yield f"{folder}/{name}"

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
    """A file at the source does not have the content that its hash says."""


def _replace_directory(temporary: Path, target: Path) -> None:
    """Rename a finished directory to `target`, replacing an old one."""
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
