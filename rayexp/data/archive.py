"""Archives: list their files, read one of them, and limit how much they may unpack to.

A ZIP is read directly. Nothing is extracted, so its entries cannot overwrite files; unsafe ones (`..`, absolute paths,
links) are refused all the same, since such an archive cannot be trusted. A tar can only be read from its beginning, so
it is converted to a ZIP in the cache first, file by file and under the same rules.

Sizes are checked before unpacking and counted during it, because the sizes that an archive states may be false.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import hashlib
import lzma
import os
import secrets
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from rayexp.errors import UserError
from rayexp.system.cache import cache_dir
from rayexp.system.disk import TEMPORARY, relative
from rayexp.system.locks import share

LARGEST = 1 << 30  # most bytes of one file; no image or text is larger
ALL = 200 << 30  # most bytes of all files together
TIGHT = 200  # most bytes of all files, as a multiple of the archive's size; text is compressed about ten times
PLENTY = 256 << 20  # bytes that any archive may unpack to
BLOCK = 1 << 20  # bytes unpacked at a time, and the most bytes of a header
BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
TARS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class BrokenArchiveError(UserError):
    """A file is not an archive, or a truncated or damaged one."""


def list_zip(path: Path, shown: Path) -> dict[str, tuple[int, int]]:
    """The files of a ZIP: name -> (size in bytes, CRC). Every entry is checked; `shown` is its name in errors.

    Raises:
        UserError: it is not a ZIP or a truncated one, or an entry is unsafe, too large or listed twice.
    """
    files: dict[str, tuple[int, int]] = {}
    total = 0
    for entry in _archive(path, shown).infolist():
        name = entry.filename
        check_name(shown, name)
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise UserError(f"{shown}: entry {name!r} is a symbolic link; refused")
        total += entry.file_size
        check_size(shown, name, entry.file_size, total)
        if entry.is_dir():
            continue
        if name in files:
            raise UserError(f"{shown}: entry {name!r} stands there twice")
        files[name] = (entry.file_size, entry.CRC)
    return files


def check_name(shown: Path, name: str) -> None:
    """Refuse an entry whose name leads out of the archive (UserError)."""
    try:
        relative(name)
    except UserError:
        raise UserError(f"{shown}: entry {name!r} leads out of the archive; refused") from None


def check_size(shown: Path, name: str, size: int, total: int) -> None:
    """Refuse an entry of `size` bytes, or entries of `total` bytes together, if that is too much (UserError)."""
    if size > LARGEST:
        raise UserError(
            f"{shown}: entry {name!r} claims {size / 1e9:,.1f} GB; refused (at most {LARGEST / 1e9:,.1f} GB a file)"
        )
    if total > min(ALL, max(PLENTY, TIGHT * shown.stat().st_size)):
        raise UserError(
            f"{shown}: unpacks to more than {total / 1e9:,.1f} GB, from {shown.stat().st_size / 1e6:,.1f} MB; refused"
        )


def read(path: Path, name: str, where: str, most: int = LARGEST) -> bytes:
    """The bytes of one file in a ZIP.

    Args:
        path, name: the ZIP, and the file in it.
        where: the file's name in errors.
        most: refuse a file with more bytes.

    Raises:
        UserError: the file is missing, damaged or too large, as the archive states or as it is unpacked.
    """
    try:
        archive = _archive(path, path)
        entry = archive.getinfo(name)
        if entry.file_size > most:
            raise UserError(
                f"{where}: unpacks to {entry.file_size / 1e6:,.0f} MB; refused (at most {most / 1e6:,.0f} MB)"
            )
        # Only deflate can be unpacked in pieces of a given size; other methods are fed little input at a time.
        step = BLOCK if entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else 4096
        with archive.open(entry) as file:
            return b"".join(iter(lambda: file.read(step), b""))
    except KeyError:
        raise UserError(f"{where}: missing") from None
    except BROKEN as error:
        raise UserError(f"{where}: damaged ({error})") from error
    except (NotImplementedError, RuntimeError) as error:  # another compression, a password
        raise UserError(f"{where}: cannot be read ({error})") from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from error


@functools.lru_cache(maxsize=2)
def _open_archive(path: Path, size: int, mtime: int) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(path)
    _hold(archive)
    return archive


def _hold(archive: zipfile.ZipFile) -> None:
    """Take a shared lock of the archive's file while it is open, so that pruning the cache does not remove it."""
    if archive.fp is not None:
        share(archive.fp.fileno())


def _archive(path: Path, shown: Path) -> zipfile.ZipFile:
    """The opened archive; it is kept open until the file changes."""
    try:
        info = path.stat()
        return _open_archive(path, info.st_size, info.st_mtime_ns)
    except BROKEN as error:
        raise BrokenArchiveError(f"{shown}: not a ZIP archive, or a truncated one ({error}{_looks(path)})") from error
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror or error})") from error


def _looks(path: Path) -> str:
    """A remark for errors if a file that should be an archive is a web page; else an empty string."""
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    return "; it is a web page: a login, or an error" if head.startswith((b"<!doctype html", b"<html")) else ""


# ---------------------------------------------------------------------- tar


def as_zip(path: Path) -> Path:
    """The file itself, or for a tar (plain or compressed by gzip, bzip2 or xz) a ZIP of the same files in the cache.

    Raises:
        UserError: the tar is damaged, an entry is unsafe or too large, or the cache cannot be written.
    """
    unpack = _tar(path)
    if unpack is None:
        return path
    try:
        info = path.stat()
        identity = f"{path.absolute()} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"
        key = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
        made = cache_dir() / "archives" / f"{path.name}-{key[:16]}.zip"
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            temporary = made.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{made.name}")
            try:
                with unpack(path) as stream:
                    _convert(path, _Forward(path, stream), temporary)
                temporary.replace(made)
            finally:
                temporary.unlink(missing_ok=True)
    except BROKEN as error:
        raise BrokenArchiveError(f"{path}: not a tar archive, or a truncated one ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be unpacked into {cache_dir()} ({error.strerror or error})") from error
    return made


def _tar(path: Path) -> Callable[[Path], Any] | None:
    """The function that opens a tar's uncompressed stream; None if the file is not a tar."""
    try:
        with path.open("rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if head[257:262] == b"ustar":
        return lambda path: path.open("rb")
    return next((how for magic, how in TARS.items() if head.startswith(magic)), None)


def _convert(path: Path, stream: _Forward, to: Path) -> None:
    total = 0
    with (
        tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:", encoding="utf-8", errors="surrogateescape") as archive,
        zipfile.ZipFile(to, "w") as zipped,
    ):
        _hold(zipped)
        while (entry := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them in memory
            if entry.isdir():
                continue
            check_name(path, entry.name)
            if not entry.isreg() or entry.issparse():
                raise UserError(f"{path}: entry {entry.name!r} is a link, a device or has holes; refused")
            total += entry.size + tarfile.BLOCKSIZE
            check_size(path, entry.name, entry.size, total)
            # Names in a ZIP are UTF-8; names that are not are read as Latin-1.
            raw = os.fsencode(entry.name.removeprefix("./"))
            name = entry.name.removeprefix("./") if _is_utf8(raw) else raw.decode("latin-1")
            source = archive.extractfile(entry)
            with zipped.open(zipfile.ZipInfo(name), "w", force_zip64=entry.size >= LARGEST) as target:
                while source and (block := source.read(BLOCK)):
                    target.write(block)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


class _Forward:
    """A stream for tarfile that only moves forward and refuses headers of megabytes."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path, self.stream = path, stream
        self.at = 0

    def tell(self) -> int:
        return self.at

    def seek(self, to: int) -> None:
        """Move forward by reading."""
        while self.at < to:
            if not self.read(min(BLOCK, to - self.at)):
                raise EOFError("it ends within a file")

    def read(self, size: int = -1) -> bytes:
        """Read at most `size` bytes."""
        if not 0 <= size <= BLOCK:
            raise UserError(f"{self.path}: a header of the tar claims {size / 1e6:,.0f} MB; refused")
        data = self.stream.read(size)
        self.at += len(data)
        return data
