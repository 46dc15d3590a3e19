"""Image folders packed in the cache. They are found again by their listing or, if that has changed, by their pixels.

folders/<name>-<key>/       packed arrays, see pack.py; the key is made of names, sizes and times of the files
        files.json          size and time of every file when it was packed
        used.json           see uses.py
folders/<name>-<other key>  a link to the above: another listing with the same pixels
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayexp.config import DataConfig
from rayexp.data import ImageSplit, pool, uses
from rayexp.data.pack import SPLITS, Item, PackPlan, chunk_rows, done, pack
from rayexp.data.packed import open_packed, read_meta
from rayexp.errors import UserError
from rayexp.system.cache import cache_dir
from rayexp.system.disk import TEMPORARY, write_atomic

FILES = "files.json"


def home() -> Path:
    """The folder that contains the packed ones."""
    return cache_dir() / "folders"


def location(plan: PackPlan, root: Path) -> Path:
    """Where the folder `root`, with its present listing, is or will be packed."""
    return home() / f"{root.name}-{plan.key()[:16]}"


def packed_for(plan: PackPlan, root: Path) -> Path:
    """The packed folder for `root`; it is packed unless there is one with the same pixels.

    Raises:
        UserError: as for pack, or a file that was touched cannot be decoded.
    """
    at = location(plan, root)
    if not done(at):
        if at.is_symlink():
            at.unlink(missing_ok=True)  # a dangling link
        same = None if at.exists() else _same(plan)
        if same is None:
            pack(at, lambda: plan)
            with contextlib.suppress(OSError):  # without it, all files count as touched
                write_atomic(at / FILES, json.dumps({split: _marks(plan, split) for split in SPLITS}))
        else:
            at = _link(at, same)
    uses.note(at, root)
    return at


def matches(plan: PackPlan, meta: dict[str, Any]) -> bool:
    """Whether packed data have the same names (and so labels), classes and image size as a plan. The pixels are not
    compared."""
    return (
        (meta["dataset"], meta["image_size"]) == (plan.dataset, plan.size)
        and [tuple(one) for one in meta["classes"]] == list(plan.classes)
        and all(meta["names"][split] == [name for _, name, _ in plan.splits[split]] for split in SPLITS)
    )


def _marks(plan: PackPlan, split: str) -> list[list[int]]:
    return [list(plan.source.files[file]) for file, _, _ in plan.splits[split]]


def _same(plan: PackPlan) -> Path | None:
    """A packed folder with the same pixels as the plan; None if there is none. Only files whose size or mtime has
    changed since it was packed are decoded."""
    for candidate in sorted(home().glob("*")):
        if candidate.is_symlink() or candidate.name.startswith(TEMPORARY) or not done(candidate):
            continue
        try:
            if not matches(plan, read_meta(candidate)):
                continue
            data = open_packed(candidate, DataConfig(name="folder", root=candidate, image_size=plan.size))
        except UserError:
            continue  # damaged
        if all(_equal(plan, candidate, split, of) for split, of in (("train", data.train), ("val", data.val))):
            return candidate
    return None


def _equal(plan: PackPlan, candidate: Path, split: str, packed: ImageSplit) -> bool:
    items = plan.splits[split]
    try:
        before = json.loads((candidate / FILES).read_bytes())[split]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    now = _marks(plan, split)
    if not isinstance(before, list) or len(before) != len(now):
        before = [None] * len(now)
    touched = [row for row, (one, other) in enumerate(zip(before, now, strict=True)) if one != other]
    size = chunk_rows(plan.size)
    return _decode_equal(plan, items, packed, [touched[at : at + size] for at in range(0, len(touched), size)])


def _decode_equal(plan: PackPlan, items: Sequence[Item], packed: ImageSplit, parts: list[list[int]]) -> bool:
    calls = (plan.call([items[row] for row in part]) for part in parts)
    with contextlib.closing(pool.ordered(plan.decoder, calls, min(pool.cores(), max(1, len(parts))))) as answers:
        return all(
            answer[:32] == hashlib.sha256(packed.images.take(part, axis=0).data).digest()
            for part, answer in zip(parts, answers, strict=True)
        )


def _link(at: Path, to: Path) -> Path:
    """Make `at` a link to `to` and return it. If links are not possible, return `to`, which will be found by its pixels
    again."""
    temporary = at.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
    try:
        temporary.symlink_to(to.name)
        temporary.replace(at)
    except OSError:
        temporary.unlink(missing_ok=True)
        return to
    return at
