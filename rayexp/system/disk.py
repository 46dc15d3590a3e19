"""Write files and directories so that they are complete or absent, and find a directory by part of its name."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rayexp.display import counted
from rayexp.errors import UserError, WriteError, nearest

TEMPORARY = ".tmp-"  # the prefix of everything that is being written
MADE = re.compile(r"\d{8}T\d{6}Z-(?P<name>.+)-[0-9a-f]{4}")  # a directory's name as `make_directory` gives it
KINDS = {"run": "run.json", "comparison": "compare.json"}  # directories with a name, and the file that tells them
SHOWN = 8  # names listed in an error
NEWEST = "@newest"  # refers to the directory that was made last
OLD = "-old"  # suffix of a directory's temporary name while another directory replaces it
ATTEMPTS = 100  # to find a free name for a directory
TAIL = 1 << 16  # bytes read at once from the end of a file
# Errors of file systems that cannot flush a directory; EACCES: the directory is writable but not readable.
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EACCES})


def now() -> str:
    """UTC, ISO 8601, whole seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """While something is written under temporary names: turn a system error into a WriteError that names `path`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        # A file is where a folder should be made.
        number = errno.ENOTDIR if error.errno == errno.EEXIST else error.errno or errno.EIO
        raise WriteError(number, os.strerror(number), str(path)) from error


def write_atomic(path: Path, data: bytes | str, within: Path | None = None) -> None:
    """Write a file so that a reader, or a crash, sees either the old bytes or the new ones, never a part.

    Args:
        path: the file; folders on the way that are missing are made.
        data: its content.
        within: a directory that is not made anew where the file is to lie in it, because somebody may have removed it.

    Raises:
        WriteError: it cannot be written; the old bytes are still there.
    """
    with naming(path):
        if within is not None and path.is_relative_to(within):
            for folder in reversed(path.parents[: len(path.relative_to(within).parts) - 1]):
                folder.mkdir(exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            _write(temporary, data)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` for a JSON value, indented."""
    write_atomic(path, json.dumps(value, indent=2, default=str) + "\n")


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a directory of files (their names may have folders in them) in one step; an existing one is replaced.

    Raises:
        WriteError: it cannot be written; the existing one is still there.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        old = temporary.with_name(temporary.name + OLD)
        try:
            temporary.mkdir()
            for name, data in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                _write(temporary / name, data)
            sync_directory(temporary)
            if path.exists():
                path.replace(old)
            temporary.replace(path)
            sync_directory(path.parent)
        except BaseException:
            _put_back(old, path)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory so that a reader, or a crash, sees all of it or nothing: it loses its name first.

    What a crash leaves under a temporary name is for `sweep`.

    Raises:
        WriteError: it cannot be renamed; all of it is still there.
    """
    with naming(path):
        temporary = _temporary(path)
        path.replace(temporary)
        sync_directory(path.parent)
    shutil.rmtree(temporary, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file of JSON lines; it is on disk when this returns.

    A last line that a crash left incomplete is removed first, so that nothing is appended to it.

    Raises:
        WriteError: it cannot be written; the file ends as before.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists()
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            end, head = _end(handle)
            os.ftruncate(handle, end)
            try:
                _write_all(handle, f"{head}{line}\n".encode(), end)
                os.fsync(handle)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)
        if fresh:
            sync_directory(path.parent)


def _end(handle: int) -> tuple[int, str]:
    """The offset at which the complete lines of a file end, and what to write before the next one.

    A last line without a newline stays if it is valid JSON, because readers accept it too.
    """
    end = start = os.fstat(handle).st_size
    tail = b""
    while start and b"\n" not in tail:
        start = max(0, start - TAIL)
        tail = os.pread(handle, end - start, start)
    torn = tail[tail.rfind(b"\n") + 1 :]
    if not torn:
        return end, ""
    try:
        json.loads(torn)
    except ValueError:
        return end - len(torn), ""
    return end, "\n"


def _write_all(handle: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(handle, data, at)
        data, at = data[written:], at + written


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")


def _write(path: Path, data: bytes | str) -> None:
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename survives a power failure. Does nothing where a file system
    cannot do that."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sweep(path: Path) -> None:
    """Remove what a killed writer left under temporary names, and put a directory that it was about to replace back."""
    leftovers = sorted(path.glob(f"{TEMPORARY}*"))
    for leftover in leftovers:
        if leftover.name.endswith(OLD):
            _put_back(leftover, path / leftover.name[len(_temporary(path / "x").name) - 1 : -len(OLD)])
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        old.replace(path)


def relative(name: str) -> PurePosixPath:
    """A file name from outside (an archive's entry, a listing, a description), as a path that stays below any folder it
    is joined to. A leading `./` and a trailing `/` are dropped.

    Raises:
        UserError: it is empty or absolute, or a part of it is empty, `.` or `..`; backslashes count as slashes.
    """
    trimmed = name.removeprefix("./").removesuffix("/")
    parts = trimmed.replace("\\", "/").split("/")
    if {"", ".", ".."} & set(parts) or parts[0].endswith(":") or "\0" in name:
        raise UserError(f"{name!r} leads out of its folder; refused")
    return PurePosixPath(trimmed)


def inside(root: Path, name: str) -> Path:
    """The path below `root` of a file with a name from outside (see `relative`), without symbolic links on the way.

    Raises:
        UserError: as for `relative`, or a part of the path below `root` is a symbolic link.
    """
    path = root
    for part in relative(name).parts:
        path /= part
        if path.is_symlink():
            raise UserError(f"{name!r}: {path} is a symbolic link; refused")
    return path


def make_directory(storage: Path, name: str) -> Path:
    """Make a new directory `<utc>-<name>-<4 hex>` in a folder.

    Raises:
        UserError: it cannot be made.
    """
    for _ in range(ATTEMPTS):
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        made = storage / f"{stamp}-{name}-{secrets.token_hex(2)}"
        try:
            storage.mkdir(parents=True, exist_ok=True)
            made.mkdir()
        except FileExistsError:
            if not storage.is_dir():
                raise UserError(f"storage_path: {storage} is not a folder") from None
            continue  # two runs with the same name, second and random digits
        except OSError as error:
            raise UserError(f"storage_path: {WriteError(error.errno, error.strerror, str(storage))}") from error
        return made
    raise UserError(f"storage_path: no free name for {name} in {storage}")


def directories(storage: Path, file: str) -> list[Path]:
    """The directories in a folder that contain `file`, sorted by name (by `make_directory`: oldest first), including
    those where it cannot be read, and without those that are being removed.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        found = sorted(storage.iterdir()) if storage.is_dir() else []
    except OSError as error:
        raise UserError(f"{storage}: cannot be read ({error.strerror})") from error
    return [path for path in found if not path.name.startswith(TEMPORARY) and _has(path, file)]


def read_file(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, or is none: reading a pipe would wait for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _has(path: Path, file: str) -> bool:
    try:
        os.lstat(path / file)
    except OSError as error:
        # A reader will report a link loop, or a folder without permission.
        return error.errno not in (errno.ENOENT, errno.ENOTDIR)
    return True


def matching(name: str, names: Iterable[str]) -> list[str]:
    """The names of directories that `name` refers to: the equal one, else those made under that name (`txt` for
    `<utc>-txt-<4 hex>`), else those that contain it; for `@newest` the one made last."""
    names = list(names)
    if name == NEWEST:
        return sorted(names, key=lambda n: (MADE.fullmatch(n) is not None, n))[-1:]
    return (
        [n for n in names if n == name]
        or [n for n in names if (made := MADE.fullmatch(n)) and made["name"] == name]
        or [n for n in names if name and name in n]
    )


def find_directory(name: str, storage: Path, file: str, noun: str, hint: str = "") -> Path:
    """The directory that contains `file` and has the path `name`, or that `name` refers to in a folder (`matching`).

    Args:
        name: as the user typed it.
        storage: the folder.
        file: the name of a file that such a directory contains.
        noun: what such a directory is called in errors (its plural ends with s).
        hint: further help for the error, ending with `; `.

    Raises:
        UserError: none or several match.
    """
    path = Path(name).expanduser()
    with contextlib.suppress(OSError):  # the name is longer than a file name may be
        if path.is_dir() and _has(path, file):
            return path.resolve()
    names = [path.name for path in directories(storage, file)]
    found = matching(name, names)
    if len(found) > 1:
        older = f"{counted(len(found) - SHOWN, 'older one')}, " if len(found) > SHOWN else ""
        newest = f", or {NEWEST} for the last of them" if set(matching(NEWEST, names)) <= set(found) else ""
        raise UserError(
            f"{name!r} names several {noun}s in {storage}; give more of one{newest}: "
            f"{older}{', '.join(sorted(found)[-SHOWN:])}"
        )
    if not found:
        other, its_file = next((kind, kept) for kind, kept in KINDS.items() if kept != file)
        what = f", but a {other}" if matching(name, [p.name for p in directories(storage, its_file)]) else ""
        bare, at, _ = name.rpartition("@")
        if at and matching(bare, names):
            what = f": a {noun} is named without an epoch, {bare}"
        raise UserError(
            f"no {noun} {name!r} in {storage}{what or nearest(name, names)}; give a {noun} directory's path or name "
            f"({hint}--runs DIR looks elsewhere)"
        )
    return storage.resolve() / found[0]
