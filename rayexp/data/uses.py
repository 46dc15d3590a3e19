"""Keep track of what uses a packed folder in the cache: the folders it was opened for, and processes that map it."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rayexp.system.disk import write_atomic
from rayexp.system.locks import share

USED = "used.json"


def note(packed: Path, root: Path) -> None:
    """Remember that the user's folder `root` is read from `packed`."""
    known = users(packed)
    if str(root) not in known:
        with contextlib.suppress(OSError):  # only pruning reads it
            write_atomic(packed / USED, json.dumps([*known, str(root)]))


def users(packed: Path) -> list[str]:
    """The folders that were read from `packed`; none if an older rayexp packed it."""
    try:
        found = json.loads((packed / USED).read_bytes())
    except (OSError, ValueError):
        return []
    return [str(one) for one in found] if isinstance(found, list) else []


def hold(packed: Path, array: NDArray[Any]) -> None:
    """Take a shared lock of `packed` for as long as its mapped array lives, so that pruning does not remove it. Does
    nothing on a file system without locks."""
    mapping: Any = array
    while mapping is not None and not isinstance(mapping, mmap.mmap):
        mapping = getattr(mapping, "base", None)
    if mapping is None:
        return
    with contextlib.suppress(OSError):
        handle = os.open(packed / "meta.json", os.O_RDONLY)
        weakref.finalize(mapping, os.close, handle)
        share(handle)
