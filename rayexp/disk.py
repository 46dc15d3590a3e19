"""Files and directories that are complete or absent, a directory by part of its name, and one driver at a time."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rayexp.errors import UserError, nearest

TEMPORARY = ".tmp-"  # the prefix of everything that is being written
MADE = re.compile(r"\d{8}T\d{6}Z-(?P<name>.+)-[0-9a-f]{4}")  # a directory's name as `make_directory` gives it


def now() -> str:
    """UTC, ISO 8601, whole seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old bytes or the new ones and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` for a JSON value, indented."""
    write_atomic(path, json.dumps(value, indent=2, default=str) + "\n")


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a directory of files in one step; one that stands there already is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    old = temporary.with_name(temporary.name + "-old")
    try:
        temporary.mkdir()
        for name, data in files.items():
            write_atomic(temporary / name, data)
        if path.exists():
            path.replace(old)
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(path: Path) -> None:
    """Remove what a killed writer left under a temporary name."""
    for leftover in path.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def relative(name: str) -> PurePosixPath:
    """A file's name that came from outside (an archive's entry, a listing, a description), as a path that stays below
    whatever it is joined to. A leading `./` and a folder's trailing `/` say nothing and are dropped.

    Raises:
        UserError: it is empty or absolute, or a part of it is empty, `.` or `..`; backslashes count as slashes.
    """
    trimmed = name.removeprefix("./").removesuffix("/")
    parts = trimmed.replace("\\", "/").split("/")
    if {"", ".", ".."} & set(parts) or parts[0].endswith(":") or "\0" in name:
        raise UserError(f"{name!r} leads out of its folder; refused")
    return PurePosixPath(trimmed)


def inside(root: Path, name: str) -> Path:
    """Where a file with a name from outside belongs below `root`: see `relative`, and no link stands on the way.

    Raises:
        UserError: as `relative`, or a part of the path below `root` is a symbolic link.
    """
    path = root
    for part in relative(name).parts:
        path /= part
        if path.is_symlink():
            raise UserError(f"{name!r}: {path} is a symbolic link; refused")
    return path


def make_directory(storage: Path, name: str) -> Path:
    """A fresh directory `<utc>-<name>-<4 hex>` in a folder.

    Raises:
        UserError: it cannot be made.
    """
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    made = storage / f"{stamp}-{name}-{secrets.token_hex(2)}"
    try:
        made.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"storage_path: {made} cannot be made ({error.strerror})") from error
    return made


def directories(storage: Path, file: str) -> list[Path]:
    """The directories in a folder that hold such a file, by name (made by `make_directory`: oldest first); those too
    in which it is there, or may be, but cannot be read.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return [path for path in sorted(storage.iterdir()) if _has(path, file)] if storage.is_dir() else []
    except OSError as error:
        raise UserError(f"{storage}: cannot be read ({error.strerror})") from error


def _has(path: Path, file: str) -> bool:
    try:
        os.lstat(path / file)
    except OSError as error:
        # A link that leads round in a circle and a folder that may not be entered are for a reader to name.
        return error.errno not in (errno.ENOENT, errno.ENOTDIR)
    return True


def matching(name: str, names: Iterable[str]) -> list[str]:
    """The names of directories that `name` means: the one that is called so, else those that were made under that name
    (`txt` of `<utc>-txt-<4 hex>`), else those that contain it."""
    names = list(names)
    return (
        [n for n in names if n == name]
        or [n for n in names if (made := MADE.fullmatch(n)) and made["name"] == name]
        or [n for n in names if name and name in n]
    )


def find_directory(name: str, storage: Path, file: str, noun: str, hint: str = "") -> Path:
    """The directory with such a file whose path is `name`, or that `name` means among those in a folder (`matching`).

    Args:
        noun: what such a directory is called (plural with an s).
        hint: what else may help.

    Raises:
        UserError: none or several match.
    """
    path = Path(name).expanduser()
    with contextlib.suppress(OSError):  # a name longer than any file's
        if path.is_dir() and _has(path, file):
            return path.resolve()
    names = [path.name for path in directories(storage, file)]
    found = matching(name, names)
    if len(found) > 1:
        raise UserError(f"{name!r} names several {noun}s in {storage}: {', '.join(found)}")
    if not found:
        raise UserError(
            f"no {noun} {name!r} in {storage}{nearest(name, names)}; give a {noun} directory's path or name "
            f"({hint}--runs DIR looks elsewhere)"
        )
    return storage.resolve() / found[0]


@contextlib.contextmanager
def only_driver(root: Path) -> Iterator[None]:
    """Hold a directory's lock; the system lets go of it whenever this process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    with (root / "driver.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(f"{root.name}: another process is running it (pid {file.read() or 'unknown'})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
