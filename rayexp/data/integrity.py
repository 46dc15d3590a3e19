"""Check that packed pixels are still those that were packed: each array is hashed before its first use, and again
whenever its file is replaced or written to.

A good result is remembered in `cache_dir()/verified`, for this user and machine, together with the file's identity:
device, inode, size, mtime, and ctime (which no program can set back). So the workers of a machine hash 1.2 GB once, not
eight times, and an edit that restores the mtime is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.data import pool
from rayexp.errors import UserError
from rayexp.system.cache import cache_dir
from rayexp.system.disk import write_atomic
from rayexp.system.locks import locked

Identity = list[int]
COARSE_S, FINE_S = 2.0, 0.05  # largest resolution of file times: of those in whole seconds, and of finer ones


def identity(path: Path) -> Identity:
    """Numbers that change if a file is written to or replaced: device, inode, size in bytes, mtime and ctime in ns."""
    info = path.stat()
    return [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def check_images(
    path: Path, images: NDArray[np.uint8], opened: Identity, rows: int, chunks: Sequence[str], *, anew: bool = False
) -> None:
    """Compare a mapped array with the sha256 of its chunks, unless this file is remembered as good.

    Args:
        path: the file.
        images: uint8[n, height, width, 3], the mapped file.
        opened: the identity of the file just before it was mapped.
        rows: the number of images in a chunk.
        chunks: the sha256 of each chunk when it was packed.
        anew: hash the file in any case.

    Raises:
        UserError: a chunk differs; the line names the file and the images.
    """
    digest = hashlib.sha256(f"{rows} {' '.join(chunks)}".encode()).hexdigest()
    note = _note(path)
    with contextlib.ExitStack() as stack:
        if not anew:
            if _remembered(note, path, opened, digest):
                return
            stack.enter_context(_alone(note))
            if _remembered(note, path, opened, digest):  # another worker hashed it while this one waited
                return
        times_tell = _wait_for_next_file_time(opened)
        bad = _first_difference(images, rows, chunks)
        if bad is not None:
            last = min(bad + rows, len(images)) - 1
            raise UserError(
                f"{path}: damaged (images {bad} to {last} are not those that were packed); remove {path.parent}, "
                f"and the same command (or `rayexp data fetch`) packs it again"
            )
        if note and times_tell:
            with contextlib.suppress(OSError):  # without the note, the file is only hashed again
                write_atomic(note, json.dumps({"path": str(path), "identity": opened, "chunks": digest}))


def _first_difference(images: NDArray[np.uint8], rows: int, chunks: Sequence[str]) -> int | None:
    """The first image of the first chunk with another hash, or None. Threads use all cores, since hashlib releases the
    interpreter lock."""
    starts = range(0, len(images), rows)
    if len(starts) != len(chunks):
        return 0

    def good(start: int, sha: str) -> bool:
        return hashlib.sha256(images[start : start + rows].data).hexdigest() == sha

    with ThreadPoolExecutor(pool.cores(), thread_name_prefix="rayexp-check") as threads:
        for start, same in zip(starts, threads.map(good, starts, chunks), strict=True):
            if not same:
                threads.shutdown(cancel_futures=True)
                return start
    return None


def _wait_for_next_file_time(opened: Identity) -> bool:
    """Wait until any later write must change the file's times, which have a limited resolution. False if the clocks of
    this host and the file system disagree."""
    changed = opened[-1]
    step = COARSE_S if changed % 1_000_000_000 == 0 else FINE_S
    age = time.time() - changed / 1e9
    if 0 <= age < step:
        time.sleep(step - age)
    return age >= 0


# ---------------------------------------------------------------------- remembered results


def _note(path: Path) -> Path | None:
    """The note that remembers the result for a file; None if other users could write there, or nobody can."""
    folder = cache_dir() / "verified"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
        real = path.resolve()
    except OSError:
        return None
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        return None
    # One note per machine: hosts that share a cache see the file through different page caches.
    name = f"{platform.node()}\0{real}".encode("utf-8", "surrogateescape")
    return folder / hashlib.sha256(name).hexdigest()[:32]


def _remembered(note: Path | None, path: Path, opened: Identity, digest: str) -> bool:
    if note is None:
        return False
    try:
        found: Any = json.loads(note.read_bytes())
        return bool(
            isinstance(found, dict)
            and found.get("identity") == opened == identity(path)
            and found.get("chunks") == digest
        )
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _alone(note: Path | None) -> Iterator[None]:
    """Let other processes wait that are about to hash the same file. Without locks, each hashes it."""
    with contextlib.ExitStack() as stack:
        if note is not None:
            with contextlib.suppress(OSError):
                stack.enter_context(locked(note.with_name(f"{note.name}.lock")))
        yield
