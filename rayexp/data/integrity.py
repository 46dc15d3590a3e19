"""Whether packed pixels are still those that were packed: each array is hashed before its first use, and once more
whenever its file is another one or was written to.

What was found is remembered in `cache_dir()/verified`, for this user and machine, under the file's identity: device,
inode, size, and the times at which content (mtime) and anything at all (ctime, which no program can set back) last
changed. So the workers of a machine hash 1.2 GB once, not eight times, and an edit that restores the mtime is seen.
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
from rayexp.data.download import cache_dir
from rayexp.errors import UserError
from rayexp.system.disk import write_atomic
from rayexp.system.locks import locked

Identity = list[int]
COARSE_S, FINE_S = 2.0, 0.05  # the longest step of file times kept in whole seconds, and of finer ones


def identity(path: Path) -> Identity:
    """What changes when a file is written to or replaced: device, inode, size, mtime and ctime in ns."""
    info = path.stat()
    return [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def check_images(
    path: Path, images: NDArray[np.uint8], opened: Identity, rows: int, chunks: Sequence[str], *, anew: bool = False
) -> None:
    """Compare the mapped file `path` with the sha256 of its chunks of `rows` images, unless this very file was found
    to be good before.

    Args:
        path: of the array.
        images: uint8[n, height, width, 3], the file mapped.
        opened: the file's identity just before it was mapped.
        rows, chunks: how it was hashed when it was packed.
        anew: hash it whatever is remembered.

    Raises:
        UserError: it differs; the line names the file and the images.
    """
    digest = hashlib.sha256(f"{rows} {' '.join(chunks)}".encode()).hexdigest()
    note = _note(path)
    with contextlib.ExitStack() as stack:
        if not anew:
            if _remembered(note, path, opened, digest):
                return
            stack.enter_context(_alone(note))
            if _remembered(note, path, opened, digest):  # another worker has hashed it while this one waited
                return
        settled = _let_settle(opened)
        bad = _first_difference(images, rows, chunks)
        if bad is not None:
            last = min(bad + rows, len(images)) - 1
            raise UserError(
                f"{path}: damaged (images {bad} to {last} are not those that were packed); remove {path.parent}, "
                f"and the same command (or `rayexp data fetch`) packs it again"
            )
        if note and settled:
            with contextlib.suppress(OSError):  # a memory that cannot be written only costs time
                write_atomic(note, json.dumps({"path": str(path), "identity": opened, "chunks": digest}))


def _first_difference(images: NDArray[np.uint8], rows: int, chunks: Sequence[str]) -> int | None:
    """The first image of the first chunk with another hash; all cores hash (numpy and hashlib let the lock go)."""
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


def _let_settle(opened: Identity) -> bool:
    """Wait until a later write must show in the file's times, which go in steps; False where the clocks disagree."""
    changed = opened[-1]
    step = COARSE_S if changed % 1_000_000_000 == 0 else FINE_S
    age = time.time() - changed / 1e9
    if 0 <= age < step:
        time.sleep(step - age)
    return age >= 0


# ---------------------------------------------------------------------- the memory


def _note(path: Path) -> Path | None:
    """Where it is remembered of a file; None where others could write there, or nobody can."""
    folder = cache_dir() / "verified"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
        real = path.resolve()
    except OSError:
        return None
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        return None
    # By machine: a cache may be shared between hosts that see the file through different page caches.
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
    """Others who are to hash the same file wait. Where there is no lock to be had, each hashes for itself."""
    with contextlib.ExitStack() as stack:
        if note is not None:
            with contextlib.suppress(OSError):
                stack.enter_context(locked(note.with_name(f"{note.name}.lock")))
        yield
