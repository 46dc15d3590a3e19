"""Keep track of what uses a packed folder in the cache: the folders and datasets it was opened for, and processes that
map it."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rayexp.system.disk import write_atomic
from rayexp.system.locks import share

USED = "used.json"


def note(packed: Path, user: Path | Mapping[str, Any]) -> None:
    """Remember what is read from `packed`: the user's folder, or the ingredients of a dataset of the user's own (see
    recipe.py)."""
    known, new = _known(packed), json.loads(json.dumps(str(user) if isinstance(user, Path) else user, default=str))
    if new not in known:
        with contextlib.suppress(OSError):  # only pruning reads it
            write_atomic(packed / USED, json.dumps([*known, new]))


def folders(packed: Path) -> list[Path]:
    """The folders that were read from `packed`; none if an older rayexp packed it."""
    return [Path(one) for one in _known(packed) if isinstance(one, str)]


def recipes(packed: Path) -> list[dict[str, Any]]:
    """The ingredients of the datasets of the user's own that were read from `packed`; none if an older rayexp packed
    it."""
    return [one for one in _known(packed) if isinstance(one, dict)]


def _known(packed: Path) -> list[Any]:
    try:
        found = json.loads((packed / USED).read_bytes())
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


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
