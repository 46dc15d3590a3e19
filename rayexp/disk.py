"""Files and directories that are complete or absent, and a directory by part of its name."""

from __future__ import annotations

import datetime
import errno
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayexp.errors import UserError, nearest

TEMPORARY = ".tmp-"  # the prefix of everything that is being written
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF})
"""What file systems answer that cannot flush a directory by itself."""


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
    """Flush a directory's entries, so that a rename survives a power cut; where a file system cannot, it is left."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def sweep(path: Path) -> None:
    """Remove what a killed writer left under a temporary name."""
    for leftover in path.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


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
    """The directories in a folder that hold such a file, by name (made by `make_directory`: oldest first)."""
    return [path for path in sorted(storage.iterdir()) if (path / file).is_file()] if storage.is_dir() else []


def find_directory(name: str, storage: Path, file: str, noun: str, hint: str = "") -> Path:
    """The directory with such a file whose path, name, or unambiguous part of the name is `name`.

    Args:
        noun: what such a directory is called (plural with an s).
        hint: what else may help.

    Raises:
        UserError: none or several match.
    """
    path = Path(name).expanduser()
    if (path / file).is_file():
        return path.resolve()
    names = [path.name for path in directories(storage, file)]
    found = [n for n in names if n == name] or [n for n in names if name and name in n]
    if len(found) > 1:
        raise UserError(f"{name!r} names several {noun}s in {storage}: {', '.join(found)}")
    if not found:
        raise UserError(
            f"no {noun} {name!r} in {storage}{nearest(name, names)}; give a {noun} directory's path or name "
            f"({hint}--runs DIR looks elsewhere)"
        )
    return (storage / found[0]).resolve()
