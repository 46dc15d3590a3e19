"""List the entries of the cache, decide which are still of use, and remove the others."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayexp.config import references
from rayexp.data import folder, folder_cache, recipe, shapes, text, uses
from rayexp.data.pack import LOCK, PARTIAL, done
from rayexp.data.packed import read_meta
from rayexp.data.resize import source_of
from rayexp.errors import UserError
from rayexp.system.cache import cache_dir
from rayexp.system.disk import TEMPORARY
from rayexp.system.locks import unshared

IN_USE = "in use by a running process"
_WRITING = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-f]{{8}}-")  # before the name of what write_directory writes


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or folder in the cache.

    Attributes:
        path: the file or folder.
        what: its kind.
        of: the folders, or the datasets of the user's own, that it was made from; empty if that is not known.
        bytes: its size on disk.
        state: why it is kept or may be removed.
        stale: whether it may be removed, because nothing uses it any more.
    """

    path: Path
    what: str
    of: str
    bytes: int
    state: str
    stale: bool

    def to_json(self) -> dict[str, Any]:
        """As `rayexp data cache --json` prints it."""
        return {
            "path": str(self.path),
            "what": self.what,
            "of": self.of,
            "bytes": self.bytes,
            "state": self.state,
            "stale": self.stale,
        }


def entries() -> list[Entry]:
    """Everything in `cache_dir`, by kind and name."""
    cache = cache_dir()
    found = [
        *(_images(path) for path in _in(folder_cache.home()) if not path.is_symlink()),
        *(_text(path) for path in _in(text.home())),
        *(_shapes(path) for path in _in(cache) if path.name.startswith("shapes-v")),
        *(_archive(path) for path in _in(cache / "archives")),
        *(_download(path) for path in _in(cache / "downloads") if not path.name.endswith(".version")),
        *(_code(path) for path in _in(references.home())),
    ]
    return found


def prune() -> Iterator[Entry]:
    """Remove stale entries, and yield each one after it is removed (UserError if it cannot be)."""
    for entry in entries():
        if entry.stale and _remove(entry):
            yield entry
    for link in _in(folder_cache.home()):
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)


def _in(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if not one.name.endswith(".lock")) if path.is_dir() else []


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def _lock(path: Path) -> Path:
    """What is locked while an entry is in use: by packing it, by downloading it, or by reading it."""
    if path.is_dir():
        places = [path / "meta.json", path / PARTIAL / LOCK]
        if _WRITING.match(path.name):
            places.insert(0, path.with_name(f"{_WRITING.sub('', path.name)}.lock"))
        return next((place for place in places if place.exists()), path)
    beside = path.with_name(f"{path.name}.lock")
    return beside if beside.exists() else path


def _entry(path: Path, what: str, of: str, stale: str | None, kept: str = "") -> Entry:
    """`stale` says why an entry may be removed, `kept` why it is kept; one that a process uses is kept in any case."""
    with unshared(_lock(path)) as free:
        state = (stale or kept) if free else IN_USE
        return Entry(path, what, of, _bytes(path), state, free and stale is not None)


def _remove(entry: Entry) -> bool:
    """Remove an entry under its lock, so that nobody begins to use it meanwhile; False if a process uses it."""
    with unshared(_lock(entry.path)) as free:
        if not free:
            return False
        try:
            if entry.path.is_dir():
                gone = entry.path.with_name(f"{TEMPORARY}gone-{entry.path.name}")
                entry.path.rename(gone)  # so that there is never half a folder under its name
                shutil.rmtree(gone)
            else:
                entry.path.unlink()
                entry.path.with_name(f"{entry.path.name}.version").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{entry.path}: cannot be removed ({error.strerror or error})") from error
    return True


# ---------------------------------------------------------------------- kinds


def _leftover(path: Path, what: str) -> Entry | None:
    """The entry of an unfinished file or folder; None if it is finished."""
    if path.name.startswith(TEMPORARY):
        return _entry(path, what, "", "left by a process that was stopped")
    if not done(path):
        return _entry(path, what, "", "unfinished: packing was stopped")
    return None


def _images(path: Path) -> Entry:
    if left := _leftover(path, "images"):
        return left
    try:
        meta = read_meta(path)
    except UserError as error:
        return _entry(path, "images", "", f"damaged ({error})")
    what = f"images, {meta['image_size']} px"
    if meta["dataset"] == "own":
        return _own(path, what)
    of = uses.folders(path) or [Path(meta["source"])]
    return _used(path, what, [str(root) for root in of], [_state(path, meta, root) for root in of])


def _used(path: Path, what: str, of: Sequence[str], states: Sequence[tuple[bool, str]]) -> Entry:
    """Of data that some folders or datasets are read from: of each, whether it no longer leads there, and why."""
    kept = next((why for stale, why in states if not stale), None)
    return _entry(path, what, ", ".join(dict.fromkeys(of)), None if kept else states[0][1], kept or "")


def _own(path: Path, what: str) -> Entry:
    if not (of := uses.recipes(path)):
        return _entry(path, what, "", None, "kept: it is not known of what code")
    return _used(path, what, [one["name"] for one in of], [recipe.state(one, path.name) for one in of])


def _state(path: Path, meta: dict[str, Any], root: Path) -> tuple[bool, str]:
    """Whether the data packed in `path` are no longer those of the folder `root`, and why."""
    if not root.is_dir():
        return True, f"{root} is gone"
    changed = True, f"{root} has changed since"
    try:
        if done(root):
            same = source_of(root, read_meta(root)).key() == meta["source_key"]
            return (False, f"for {root}") if same else changed
        plan = folder.make_plan(root, meta["image_size"])
    except UserError as error:
        return False, f"kept: {error}"
    now = folder_cache.location(plan, root)
    if done(now):
        return (False, f"for {root}") if now.resolve() == path.resolve() else changed
    # Files were touched or replaced since then; only their pixels would show whether they have changed.
    return (False, f"for {root}, perhaps") if folder_cache.matches(plan, meta) else changed


def _text(path: Path) -> Entry:
    if left := _leftover(path, "text"):
        return left
    if uses.recipes(path):
        return _own(path, "text")
    if not (of := uses.folders(path)):
        return _entry(path, "text", "", None, "kept: it is not known of what folder")
    return _used(path, "text", [str(root) for root in of], [_text_state(path, root) for root in of])


def _text_state(path: Path, root: Path) -> tuple[bool, str]:
    """`_state` of a text."""
    if not root.is_dir():
        return True, f"{root} is gone"
    try:
        same = text.key(text.raw_files(root)) == path.name
    except UserError as error:
        return False, f"kept: {error}"
    return (False, f"for {root}") if same else (True, f"{root} has changed since")


def _shapes(path: Path) -> Entry:
    old = not path.name.startswith(f"shapes-v{shapes.VERSION}-")
    left = _leftover(path, "shapes")
    return left or _entry(path, "shapes", "", "of an older rayexp" if old else None, "made by rayexp")


def _code(path: Path) -> Entry:
    left = path.name.startswith(TEMPORARY)
    why = "left by a process that was stopped" if left else "copied again when it is needed"
    return _entry(path, "code of yours", "", why)


def _archive(path: Path) -> Entry:
    return _entry(path, "unpacked tar", "", "left by a fetch that was stopped")


def _download(path: Path) -> Entry:
    if path.name.startswith(TEMPORARY):
        return _entry(path, "download", "", "unfinished")
    return _entry(path, "download", "", None, "kept: `rayexp data fetch` reads it again")
