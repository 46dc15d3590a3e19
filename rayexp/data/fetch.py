"""Where raw data comes from: an archive (see archive.py), a folder or a URL (see download.py), read in place."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayexp.data import archive
from rayexp.data.download import cache_dir, download
from rayexp.errors import UserError

__all__ = ["FileSource", "cache_dir", "download", "is_url", "list_folder", "open_source", "read"]


@dataclass(frozen=True, slots=True)
class FileSource:
    """The files of an archive or of a folder, under one prefix.

    Attributes:
        path: the ZIP (for a tar, the one that archive.as_zip made of it) or the folder.
        prefix: what stands before every name inside (`tiny-imagenet-200/`, or nothing).
        files: name without the prefix -> something that changes when the file does (size and CRC, or size and mtime).
        url: where the archive was downloaded from, if it was.
        shown: what error lines call it, if not `path`.
    """

    path: Path
    prefix: str
    files: Mapping[str, tuple[int, int]]
    url: str | None = None
    shown: Path | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @property
    def origin(self) -> str:
        """The URL or the absolute path."""
        return self.url or str((self.shown or self.path).absolute())

    def where(self, name: str) -> str:
        """The file as error lines name it: `a.zip:train/x.JPEG` or `folder/train/x.JPEG`."""
        at = self.shown or self.path
        return f"{at / self.prefix / name}" if self.path.is_dir() else f"{at}:{self.prefix}{name}"

    def read(self, name: str) -> bytes:
        """One file's bytes.

        Raises:
            UserError: it is missing or damaged (CRC); the line names it.
        """
        if name not in self.files:
            raise UserError(f"{self.where(name)}: missing")
        return read(self.path, self.prefix + name, self.where(name))

    def release(self) -> None:
        """All has been read, or is not to be: the ZIP that was made of a tar goes."""
        if self.shown is not None:
            self.path.unlink(missing_ok=True)

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


def open_source(source: str | Path, *markers: str, layout: str = "") -> FileSource:
    """List an archive (ZIP or tar) or a folder (download a URL first). A marker is a file name that shows where the
    data begins: at the top, or in a folder below it (in a folder: at most two deep). The first that is there counts.

    Raises:
        UserError: there is no such file, it is no archive or a truncated one, an entry is unsafe, too large or stands
            there twice, or no marker is in it (`layout` then says what was expected). A downloaded file that is no
            archive is not kept.
    """
    url = str(source) if is_url(source) else None
    path = download(url) if url else Path(source).expanduser()
    if path.is_dir():
        places = (f"{above}{marker}" for marker in markers for above in ("", "*/", "*/*/"))
        depths = (sorted(path.glob(place)) for place in places)
        if found := next((files[0].parent for files in depths if files), None):
            return FileSource(found, "", list_folder(found))
    elif path.is_file():
        return _open_archive(path, url, markers, layout)
    else:
        raise UserError(f"{source}: no such file or folder")
    raise _without(str(source), markers, layout)


def _open_archive(path: Path, url: str | None, markers: Sequence[str], layout: str) -> FileSource:
    zipped = path
    try:
        zipped = archive.as_zip(path)
        files = archive.list_zip(zipped, path)
        prefixes = [prefix for marker in markers if (prefix := _prefix(files, marker)) is not None]
        if not prefixes:
            raise _without(url or str(path), markers, layout)
    except UserError as error:
        if zipped != path:
            zipped.unlink(missing_ok=True)
        if url is None or not isinstance(error, archive.BrokenArchiveError):
            raise
        path.unlink(missing_ok=True)
        raise UserError(f"{url}: {error}; it is not kept, and the same command fetches it again") from error
    prefix = prefixes[0]
    inside = {name.removeprefix(prefix): mark for name, mark in files.items() if name.startswith(prefix)}
    return FileSource(zipped, prefix, inside, url, None if zipped == path else path)


def _prefix(files: Iterable[str], marker: str) -> str | None:
    """What stands before the marker that is the least deep."""
    at = [name for name in files if f"/{name}".endswith(f"/{marker}") and not name.startswith("__MACOSX/")]
    return min(at, key=lambda name: (name.count("/"), name)).removesuffix(marker) if at else None


def _without(source: str, markers: Sequence[str], layout: str) -> UserError:
    return UserError(f"{source}: no {markers[0]} in it{f'; expected {layout}' if layout else ''}")


def read(path: Path, name: str, where: str, most: int = archive.LARGEST) -> bytes:
    """The bytes of one file in a ZIP or a folder.

    Args:
        path, name: the ZIP or folder, and the file in it.
        where: what error lines call it.
        most: refuse an archive's file that is larger.

    Raises:
        UserError: it is missing, damaged or too large.
    """
    try:
        if path.is_dir():
            return (path / name).read_bytes()
    except OSError as error:
        why = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        raise UserError(f"{where}: {why}") from error
    return archive.read(path, name, where, most)


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
