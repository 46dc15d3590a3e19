"""Who uses a packed folder of the cache: the folders it was opened for, and the processes that have it mapped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rayexp.disk import write_atomic

USED = "used.json"


def note(packed: Path, root: Path) -> None:
    """Remember that `root`, a user's folder, is read by way of `packed`."""
    known = users(packed)
    if str(root) not in known:
        with contextlib.suppress(OSError):  # then pruning knows less
            write_atomic(packed / USED, json.dumps([*known, str(root)]))


def users(packed: Path) -> list[str]:
    """The folders that were read by way of `packed`; none where an older rayexp packed it."""
    try:
        found = json.loads((packed / USED).read_bytes())
    except (OSError, ValueError):
        return []
    return [str(one) for one in found] if isinstance(found, list) else []


def hold(packed: Path, array: NDArray[Any]) -> None:
    """Share the lock of `packed` for as long as its mapped array lives, so that nobody prunes it meanwhile. On a file
    system without locks there is none."""
    mapping: Any = array
    while mapping is not None and not isinstance(mapping, mmap.mmap):
        mapping = getattr(mapping, "base", None)
    if mapping is None:
        return
    with contextlib.suppress(OSError):
        handle = os.open(packed / "meta.json", os.O_RDONLY)
        weakref.finalize(mapping, os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Hold a file's lock, and give whether nobody else has it (True also where there is no such file, or no lock)."""
    try:
        file = path.open()
    except OSError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:
            free = True
        yield free
