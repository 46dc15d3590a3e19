"""List the entries of the cache, decide which are still of use, and remove the others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayexp.data import folder, folder_cache, shapes, text, uses
from rayexp.data.download import cache_dir
from rayexp.data.pack import PARTIAL, done
from rayexp.data.packed import read_meta
from rayexp.data.resize import source_of
from rayexp.errors import UserError
from rayexp.system.disk import TEMPORARY
from rayexp.system.locks import unshared

IN_USE = "in use by a running process"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or folder in the cache.

    Attributes:
        path: the file or folder.
        what: its kind.
        of: the folder or archive it was made from; empty if that is not known.
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
        *(_text(path) for path in _in(cache / "text")),
        *(_shapes(path) for path in _in(cache) if path.name.startswith("shapes-v")),
        *(_archive(path) for path in _in(cache / "archives")),
        *(_download(path) for path in _in(cache / "downloads") if not path.name.endswith((".lock", ".version"))),
    ]
    return [one for one in found if one is not None]


def prune() -> Iterator[Entry]:
    """Remove stale entries, and yield each one after it is removed (UserError if it cannot be)."""
    for entry in entries():
        if entry.stale and _remove(entry):
            yield entry
    for link in _in(folder_cache.home()):
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)


def _in(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else []


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def _lock(path: Path) -> Path:
    """The file that is locked while an entry is in use: by packing it, by downloading it, or by reading it."""
    if path.is_dir():
        return path / "meta.json" if (path / "meta.json").exists() else path / PARTIAL / "lock"
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


def _images(path: Path) -> Entry | None:
    if left := _leftover(path, "images"):
        return left
    try:
        meta = read_meta(path)
    except UserError as error:
        return _entry(path, "images", "", f"damaged ({error})")
    if meta["dataset"] == "own":
        return _entry(
            path, f"images, {meta['image_size']} px", str(meta["source"]), None, "kept: by a dataset of yours"
        )
    of = uses.users(path) or [str(meta["source"])]
    what = f"images, {meta['image_size']} px"
    states = [_state(path, meta, Path(root)) for root in of]
    kept = next((state for stale, state in states if not stale), None)
    return _entry(path, what, ", ".join(of), None if kept else states[0][1], kept or "")


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


def _text(path: Path) -> Entry | None:
    if left := _leftover(path, "text"):
        return left
    of = uses.users(path)
    if not of:
        return _entry(path, "text", "", None, "kept: it is not known of what folder")
    stale = []
    for root in of:
        try:
            if text.key(text.raw_files(Path(root))) == path.name:
                return _entry(path, "text", ", ".join(of), None, f"for {root}")
            stale.append(f"{root} has changed since")
        except UserError:
            stale.append(f"{root} is gone")
    return _entry(path, "text", ", ".join(of), stale[0])


def _shapes(path: Path) -> Entry | None:
    old = not path.name.startswith(f"shapes-v{shapes.VERSION}-")
    left = _leftover(path, "shapes")
    return left or _entry(path, "shapes", "", "of an older rayexp" if old else None, "made by rayexp")


def _archive(path: Path) -> Entry | None:
    return _entry(path, "unpacked tar", "", "left by a fetch that was stopped")


def _download(path: Path) -> Entry | None:
    if path.name.startswith(TEMPORARY):
        return _entry(path, "download", "", "unfinished")
    return _entry(path, "download", "", None, "kept: `rayexp data fetch` reads it again")
