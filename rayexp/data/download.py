"""Download files into the cache with requests: resume an interrupted download, check it, then rename it.

An interrupted download leaves `.tmp-NAME`. The next one continues it if the server named the version of the file (ETag
or Last-Modified) and still has that version.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from rayexp.errors import FULL, UserError, WriteError
from rayexp.system.cache import cache_dir
from rayexp.system.disk import TEMPORARY
from rayexp.system.locks import locked

TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
# Published checksums. Other downloads are checked by their length (and every file in a ZIP by its CRC).
KNOWN = {TINY_IMAGENET: "md5:90528d7ca1a48142e341f4ef8d21d0de"}
ATTEMPTS = 5
BLOCK = 1 << 20
TIMEOUT = (15, 60)  # seconds to connect, and between two pieces


def download(url: str, known_hash: str | None = None) -> Path:
    """Download the file at an http(s) URL to `cache_dir()/downloads`, unless it is there already.

    Args:
        url: the address of the file.
        known_hash: `sha256:...` or `md5:...`; None: that in KNOWN, if any.

    Returns:
        The path of the file.

    Raises:
        UserError: the server cannot be reached or refuses, the checksum differs, or the disk is full.
    """
    import requests

    known = known_hash or KNOWN.get(url)
    folder = cache_dir() / "downloads"
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{PurePosixPath(unquote(urlsplit(url).path)).name or 'file'}"
    part = folder / f"{TEMPORARY}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{TEMPORARY}{name}.lock"):  # a second process waits and then finds the file
            path = folder / name
            if not (path.exists() and _matches(path, known)):
                _fetch(url, part)
                if not _matches(part, known):
                    part.unlink()
                    raise UserError(f"{url}: what came is not the published file (checksum differs); nothing is kept")
                part.replace(path)
    except requests.HTTPError as error:
        raise UserError(f"{url}: the server refuses ({_reason(error)})") from error
    except requests.RequestException as error:
        raise UserError(
            f"{url}: cannot be downloaded ({_reason(error)}); the same command tries again and goes on"
        ) from error
    except OSError as error:
        if error.errno in FULL:
            part.unlink(missing_ok=True)
        raise UserError(str(WriteError(error.errno, error.strerror or str(error), str(folder)))) from error
    return path


def _matches(path: Path, known: str | None) -> bool:
    """Whether the file has the checksum `algorithm:hex`; True without a checksum."""
    if known is None:
        return True
    algorithm, _, wanted = known.rpartition(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm or "sha256").hexdigest() == wanted.lower()


def _fetch(url: str, part: Path) -> None:
    """Download the file to `part` in up to ATTEMPTS attempts; each continues where the one before ended."""
    import requests

    for attempt in range(ATTEMPTS):
        try:
            return _transfer(url, part)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(2**attempt / 4)


def _transfer(url: str, part: Path) -> None:
    """Make one request, only for the bytes that `part` does not have yet."""
    import requests

    version = part.with_name(part.name + ".version")
    have = part.stat().st_size if part.exists() and version.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version.read_text()}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416:  # the whole file is here already, or too many bytes
            version.unlink()
            return _transfer(url, part)
        answer.raise_for_status()
        go_on = answer.status_code == 206
        have = have if go_on else 0
        mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        if not go_on:
            version.unlink(missing_ok=True)
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            part.open("ab" if go_on else "wb") as file,
            _bar(part.name.removeprefix(TEMPORARY), total, have) as advance,
        ):
            if mark and not mark.startswith("W/"):
                version.write_text(mark)
            for block in answer.iter_content(BLOCK):
                file.write(block)
                advance(len(block))
    if total is not None and part.stat().st_size != total:
        raise requests.ConnectionError(f"{part.stat().st_size:,} of {total:,} bytes came")
    version.unlink(missing_ok=True)


@contextlib.contextmanager
def _bar(name: str, total: int | None, have: int) -> Any:
    """A progress bar on stderr (nothing if that is not a terminal)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    counts = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    columns = (*counts, TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=total, completed=have)
        yield lambda size: bar.advance(task, size)


def _reason(error: BaseException) -> str:
    """The message of the innermost cause, which is the most specific one."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    return str(getattr(error, "reason", None) or error) or type(error).__name__
