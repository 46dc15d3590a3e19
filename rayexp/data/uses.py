"""Who uses a packed folder of the cache: the folders it was opened for, and the processes that have it mapped."""

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
        share(handle)
