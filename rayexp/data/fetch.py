"""Where raw data comes from: a ZIP, a folder or a URL (see download.py), read in place.

Nothing is ever extracted, so an archive cannot write anywhere; one that tries to (`..`, absolute paths, links) is
refused all the same, because what it says is not what it holds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rayexp.data.download import cache_dir, download
from rayexp.disk import relative
from rayexp.errors import UserError

__all__ = ["Source", "cache_dir", "download", "is_url", "list_folder", "open_source", "read"]

LARGEST = 2 << 30  # bytes of one member; more is no picture and no text


@dataclass(frozen=True, slots=True)
class Source:
    """The files of a ZIP or of a folder, under one prefix.

    Attributes:
        path: the ZIP or the folder.
        prefix: what stands before every name inside (`tiny-imagenet-200/`, or nothing).
        files: name without the prefix -> something that changes when the file does (size and CRC, or size and mtime).
        url: where the archive was downloaded from, if it was.
    """

    path: Path
    prefix: str
    files: Mapping[str, tuple[int, int]]
    url: str | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @property
    def origin(self) -> str:
        """The URL or the absolute path."""
        return self.url or str(self.path.absolute())

    def where(self, name: str) -> str:
        """The file as error lines name it: `a.zip:train/x.JPEG` or `folder/train/x.JPEG`."""
        return _where(self.path, self.prefix + name)

    def read(self, name: str) -> bytes:
        """One file's bytes.

        Raises:
            UserError: it is missing or damaged (CRC); the line names it.
        """
        if name not in self.files:
            raise UserError(f"{self.where(name)}: missing")
        return read(self.path, self.prefix + name)

    def text(self, name: str) -> str:
        """One file as UTF-8 text (UserError where it is not)."""
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(name)}: not UTF-8 text ({error.reason} at byte {error.start})") from error

    def key(self) -> str:
        """sha256 over the listing: another archive, or a changed file, gives another key. No content is read."""
        listing = "\n".join(f"{name!r} {size} {mark}" for name, (size, mark) in sorted(self.files.items()))
        return hashlib.sha256(listing.encode("utf-8", "surrogatepass")).hexdigest()


def is_url(source: str | Path) -> bool:
    """http and https."""
    return re.match("https?://", str(source), re.IGNORECASE) is not None


def open_source(source: str | Path, marker: str, *, layout: str = "") -> Source:
    """List a ZIP or a folder (download a URL first). `marker` is a file name that shows where the data begins: at
    the top, or in a folder below it.

    Raises:
        UserError: there is no such file, it is no ZIP or a truncated one, an entry is unsafe or stands there twice, or
            no `marker` is in it (`layout` then says what was expected).
    """
    path = download(str(source)) if is_url(source) else Path(source).expanduser()
    if path.is_dir():
        found = [path] if (path / marker).is_file() else sorted(p.parent for p in path.glob(f"*/{marker}"))
        if found:
            return Source(found[0], "", list_folder(found[0]))
    elif path.is_file():
        files = _list_zip(path)
        at = [name for name in files if f"/{name}".endswith(f"/{marker}") and not name.startswith("__MACOSX/")]
        if at:
            prefix = min(at, key=lambda name: (name.count("/"), name)).removesuffix(marker)
            inside = {name.removeprefix(prefix): mark for name, mark in files.items() if name.startswith(prefix)}
            return Source(path, prefix, inside, str(source) if is_url(source) else None)
    else:
        raise UserError(f"{source}: no such file or folder")
    raise UserError(f"{source}: no {marker} in it{f'; expected {layout}' if layout else ''}")


def read(path: Path, name: str) -> bytes:
    """The bytes of one file in a ZIP or a folder (UserError where it is missing or damaged)."""
    try:
        if path.is_dir():
            return (path / name).read_bytes()
        return _archive(path).read(name)
    except KeyError:
        raise UserError(f"{_where(path, name)}: missing") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{_where(path, name)}: damaged ({error})") from error
    except (NotImplementedError, RuntimeError) as error:  # another compression, a password
        raise UserError(f"{_where(path, name)}: cannot be read ({error})") from error
    except OSError as error:
        raise UserError(f"{_where(path, name)}: cannot be read ({error.strerror or error})") from error


def list_folder(root: Path) -> dict[str, tuple[int, int]]:
    """All files below a folder: relative name with `/` -> (size, mtime in ns). Links are followed, once."""
    files: dict[str, tuple[int, int]] = {}
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        here = Path(folder).stat()
        if (here.st_dev, here.st_ino) in seen:
            below.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        start = Path(folder).relative_to(root).as_posix() + "/"
        start = "" if start == "./" else start
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a dangling link: who needs the file hears that it is missing
                info = Path(folder, name).stat()
                files[start + name] = (info.st_size, info.st_mtime_ns)
    return files


def _list_zip(path: Path) -> dict[str, tuple[int, int]]:
    """The archive's files -> (size, CRC), every entry checked."""
    files: dict[str, tuple[int, int]] = {}
    for entry in _archive(path).infolist():
        name = entry.filename
        try:
            relative(name)
        except UserError:
            raise UserError(f"{path}: entry {name!r} leads out of the archive; refused") from None
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise UserError(f"{path}: entry {name!r} is a symbolic link; refused")
        if entry.file_size > LARGEST:
            raise UserError(f"{path}: entry {name!r} claims {entry.file_size / 1e9:,.1f} GB; refused")
        if entry.is_dir():
            continue
        if name in files:
            raise UserError(f"{path}: entry {name!r} stands there twice")
        files[name] = (entry.file_size, entry.CRC)
    return files


@functools.lru_cache(maxsize=2)
def _open_archive(path: Path, size: int, mtime: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _archive(path: Path) -> zipfile.ZipFile:
    """The opened archive, kept open while it does not change."""
    try:
        info = path.stat()
        return _open_archive(path, info.st_size, info.st_mtime_ns)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: not a ZIP archive, or a truncated one ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _where(path: Path, name: str) -> str:
    return f"{path / name}" if path.is_dir() else f"{path}:{name}"
