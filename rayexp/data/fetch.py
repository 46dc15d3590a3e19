"""Read raw data from an archive (see archive.py), a folder, or a URL (see download.py)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayexp.data import archive
from rayexp.data.download import download
from rayexp.errors import UserError


@dataclass(frozen=True, slots=True)
class FileSource:
    """The files of an archive or of a folder, under one prefix.

    Attributes:
        path: the ZIP (for a tar, the one that archive.as_zip made of it) or the folder.
        prefix: the part before every name (`tiny-imagenet-200/`, or empty).
        files: name without the prefix -> two numbers that change with the file: its size in bytes, and its CRC (ZIP) or
            mtime in ns (folder).
        url: where the archive was downloaded from; None if it was not.
        shown: the path to show in errors, if not `path`.
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
        """The file's name in errors: `a.zip:train/x.JPEG` or `folder/train/x.JPEG`."""
        at = self.shown or self.path
        return f"{at / self.prefix / name}" if self.path.is_dir() else f"{at}:{self.prefix}{name}"

    def read(self, name: str) -> bytes:
        """The bytes of one file.

        Raises:
            UserError: the file is missing or damaged (CRC); the line names it.
        """
        if name not in self.files:
            raise UserError(f"{self.where(name)}: missing")
        return read(self.path, self.prefix + name, self.where(name))

    def release(self) -> None:
        """Remove the ZIP that was made of a tar, once it is no longer needed."""
        if self.shown is not None:
            self.path.unlink(missing_ok=True)

    def text(self, name: str) -> str:
        """One file as UTF-8 text (UserError if it is not)."""
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(name)}: not UTF-8 text ({error.reason} at byte {error.start})") from error

    def key(self) -> str:
        """sha256 over the listing; it differs for another archive or a changed file. No content is read."""
        listing = "\n".join(f"{name!r} {size} {mark}" for name, (size, mark) in sorted(self.files.items()))
        return hashlib.sha256(listing.encode("utf-8", "surrogatepass")).hexdigest()


def is_url(source: str | Path) -> bool:
    """Whether the source is an http or https URL."""
    return re.match("https?://", str(source), re.IGNORECASE) is not None


def open_source(source: str | Path, *markers: str, layout: str = "") -> FileSource:
    """List the files of an archive (ZIP or tar) or a folder; download a URL first.

    Args:
        source: a path or a URL.
        markers: file names that show where the data begin: at the top level or in a folder below it (if the source is a
            folder, at most two levels down). The first marker that is found counts.
        layout: what was expected, for the error if there is no marker.

    Raises:
        UserError: there is no such file, it is not an archive or a truncated one, an entry is unsafe, too large or
            listed twice, or there is no marker. A downloaded file that is not an archive is removed.
    """
    url = str(source) if is_url(source) else None
    path = download(url) if url else Path(source).expanduser()
    check_readable(path)
    if path.is_dir():
        patterns = (f"{above}{marker}" for marker in markers for above in ("", "*/", "*/*/"))
        depths = (sorted(path.glob(pattern)) for pattern in patterns)
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
    """The path before the marker, for the one at the highest level; None if there is none."""
    at = [name for name in files if f"/{name}".endswith(f"/{marker}") and not name.startswith("__MACOSX/")]
    return min(at, key=lambda name: (name.count("/"), name)).removesuffix(marker) if at else None


def _without(source: str, markers: Sequence[str], layout: str) -> UserError:
    return UserError(f"{source}: no {markers[0]} in it{f'; expected {layout}' if layout else ''}")


def read(path: Path, name: str, where: str, most: int = archive.LARGEST) -> bytes:
    """The bytes of one file in a ZIP or a folder.

    Args:
        path, name: the ZIP or folder, and the file in it.
        where: the file's name in errors.
        most: refuse a file in an archive with more bytes.

    Raises:
        UserError: the file is missing, damaged or too large.
    """
    try:
        if path.is_dir():
            return (path / name).read_bytes()
    except OSError as error:
        why = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        raise UserError(f"{where}: {why}") from error
    return archive.read(path, name, where, most)


def list_folder(root: Path) -> dict[str, tuple[int, int]]:
    """All files below a folder: relative name with `/` -> (size in bytes, mtime in ns). Each linked folder is listed
    once.

    Raises:
        UserError: a folder cannot be read; its files would be missing without a word.
    """
    files: dict[str, tuple[int, int]] = {}
    seen = set()

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        here = Path(folder).stat()
        if (here.st_dev, here.st_ino) in seen:
            below.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        start = Path(folder).relative_to(root).as_posix() + "/"
        start = "" if start == "./" else start
        for name in names:
            try:
                info = Path(folder, name).stat()
            except FileNotFoundError:
                continue  # a dangling link; a reader of the file will report it
            except OSError as error:
                refuse(error)
            files[start + name] = (info.st_size, info.st_mtime_ns)
    return files


def check_readable(root: Path) -> None:
    """Refuse (UserError) a folder that is there and cannot be listed. What is no folder is left to the caller."""
    try:
        os.scandir(root).close()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{root}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
