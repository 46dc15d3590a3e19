"""A user's code: which files travel with a run, under which names, and what references in a configuration become.

An entry of `code` is
    a file              it travels under its own name
    a package           (a folder with an `__init__.py`) it travels under its own name, with all that is in it
    another folder      what is in it travels, so that its modules are imported by their own names
    a pattern           (`./**/*.py`) the files that match, named from the last folder before the pattern on
Hidden files, caches of Python's, environments and run directories are left out.

Once a configuration is read, its entries are absolute, and a reference to a file names it as it travels. All that is
read back from a run (evaluate, diff, resume, collect) takes the copy in the run's directory, `code/`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayexp.config.components import GROUPS, is_file, is_reference, parts_of
from rayexp.display import counted
from rayexp.errors import UserError

FOLDER = "code"  # of a run's directory
MOST_FILES, MOST_BYTES = 1000, 16 << 20
MOST_SEEN = 200_000  # files and folders that are looked at
_SKIPPED = ("__pycache__", "node_modules", "site-packages")
_MARKS = ("run.json", "compare.json", "pyvenv.cfg")  # a folder that holds one is no code


# ---------------------------------------------------------------------- references in a tree of plain values


def anchor(tree: dict[str, Any], folder: Path, keys: Sequence[str] | None = None) -> None:
    """Make references to files, and the entries of `code`, absolute; relative ones count from the folder. A module that
    lies in the folder is a file there.

    Args:
        tree: a configuration as plain values; changed in place.
        folder: see above.
        keys: only what stands under these (`model`, `model.name`, `code`); None: everything.
    """
    for dotted in GROUPS:
        section, key = _places(dotted)
        held = tree if section is None else tree.get(section)
        asked = keys is None or dotted in keys or section in keys
        if asked and isinstance(held, dict) and isinstance(held.get(key), str) and is_reference(held[key]):
            held[key] = _anchored(held[key], folder)
        if asked and section and isinstance(tree.get(dotted), str) and is_reference(tree[dotted]):  # of a grid
            tree[dotted] = _anchored(tree[dotted], folder)
    if isinstance(tree.get("code"), list | tuple) and (keys is None or "code" in keys):
        tree["code"] = [str(folder.absolute() / Path(str(entry)).expanduser()) for entry in tree["code"]]


def resolve(tree: dict[str, Any], folder: Path, source: str) -> None:
    """Name the files of an anchored tree's references as they travel, and set `code` where it is not given: to the
    Python files of the folder, if a reference leads there, and of the folders of other files that are named.

    Raises:
        UserError: a file that is named, or an entry of `code`, is not there; or `code` is too much.
    """
    found: list[tuple[str, dict[str, Any], str, Path]] = []
    copies = [Path(entry) for entry in tree.get("code") or [] if Path(entry).name == FOLDER]
    for dotted in GROUPS:
        section, key = _places(dotted)
        held = tree if section is None else tree.get(section)
        if isinstance(held, dict) and isinstance(held.get(key), str) and is_file(held[key]):
            path = Path(parts_of(held[key])[0])
            if not path.is_absolute():
                continue
            # A run opens although its copy of the code is damaged; what needs the code will name the file.
            if copy := next((copy for copy in copies if path.is_relative_to(copy)), None):
                held[key] = f"{path.relative_to(copy).as_posix()}:{parts_of(held[key])[1]}"
                continue
            if not path.is_file():
                raise UserError(f"{source}: {dotted}: {path}: no such file")
            found.append((dotted, held, key, path.resolve()))
    entries = list(tree.get("code") or [])
    if not found:
        sources([entry for entry in entries if Path(entry) not in copies], source)
        return
    if not entries:
        for path in (path for *_, path in found):
            home = folder.resolve() if path.is_relative_to(folder.resolve()) else path.parent
            entries.append(_package(home) if (home / "__init__.py").exists() else f"{home}{os.sep}**{os.sep}*.py")
    entries = list(dict.fromkeys(entries))
    names = {path.resolve(): name for name, path in sources(entries, source).items()}
    for _, held, key, path in found:
        if path not in names:
            entries.append(str(path))
            names[path] = path.name
        held[key] = f"{names[path]}:{parts_of(held[key])[1]}"
    sources(entries, source)
    tree["code"] = entries


def relocate(tree: dict[str, Any], folder: str | None = None) -> None:
    """The reverse of `resolve`, for a configuration that is written: references to files lead to where these are, or to
    a folder beside the configuration that holds a copy of the code.

    Args:
        tree: of a configuration that was read, as plain values; changed in place.
        folder: the name of that folder; None: there is no copy.
    """
    entries = tree.get("code")
    if not entries:
        return
    paths = {} if folder else sources(entries)
    for section, key in (_places(dotted) for dotted in GROUPS):
        held = tree if section is None else tree[section]
        if is_file(held[key]):
            name, inner = parts_of(held[key])
            held[key] = f"{folder}/{name}:{inner}" if folder else f"{paths.get(name, name)}:{inner}"
    if folder:
        tree["code"] = [folder]


def _places(dotted: str) -> tuple[str | None, str]:
    section, _, key = dotted.rpartition(".")
    return section or None, key


def _anchored(reference: str, folder: Path) -> str:
    where, name = parts_of(reference)
    if where.endswith(".py"):
        return f"{folder.absolute() / Path(where).expanduser()}:{name}"
    inner = folder.absolute() / Path(*where.split("."))
    for path in (inner.with_name(f"{inner.name}.py"), inner / "__init__.py"):
        if path.is_file():
            return f"{path}:{name}"
    return reference


def _package(folder: Path) -> str:
    """The outermost package that a package belongs to."""
    while (folder.parent / "__init__.py").exists():
        folder = folder.parent
    return str(folder)


# ---------------------------------------------------------------------- files


def sources(entries: Sequence[str], source: str = "") -> dict[str, Path]:
    """The files that travel, by the names under which they do, in alphabetical order.

    Args:
        entries: absolute (see above).
        source: names the configuration in errors.

    Raises:
        UserError: an entry is not there or matches nothing, two files would have one name, or it is too much.
    """
    where = f"{source}: code" if source else "code"
    found: dict[str, Path] = {}
    for entry in entries:
        some = dict(_files(entry, where))
        if not some:
            raise UserError(f"{where}: {entry}: no such file or folder, or nothing in it")
        for name, path in some.items():
            if name in found and found[name].read_bytes() != path.read_bytes():
                raise UserError(f"{where}: {found[name]} and {path} would both travel as {name}")
            found.setdefault(name, path)
    size = sum(path.stat().st_size for path in found.values())
    if len(found) > MOST_FILES or size > MOST_BYTES:
        largest = sorted(found.values(), key=lambda path: -path.stat().st_size)[:3]
        named = ", ".join(f"{path} ({path.stat().st_size / 2**20:,.1f} MiB)" for path in largest)
        raise UserError(
            f"{where}: {counted(len(found), 'file')} of {size / 2**20:,.1f} MiB; allowed: {MOST_FILES:,} files of "
            f"{MOST_BYTES >> 20} MiB; largest: {named}; `code: [./a.py, ./package]` names what is to travel"
        )
    return dict(sorted(found.items()))


def read_code(entries: Sequence[str] | None) -> dict[str, bytes]:
    """The files that travel, by name; none where `entries` is None.

    Raises:
        UserError: as `sources`, or a file cannot be read.
    """
    files = {}
    for name, path in sources(entries or ()).items():
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise UserError(f"code: {path}: cannot be read ({error.strerror})") from error
    return files


def code_sha(files: Mapping[str, bytes]) -> str:
    """sha256 over names and contents; empty where there are none."""
    return manifest_sha({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def manifest_sha(hashes: Mapping[str, str]) -> str:
    """`code_sha` of files with these sha256, by name."""
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest() if hashes else ""


def _files(entry: str, where: str) -> Iterator[tuple[str, Path]]:
    path = Path(entry)
    # Signs of a pattern are allowed in the names of folders: a folder that is there is itself.
    root = next((above for above in path.parents if above.exists()), path)
    pattern = path.relative_to(root).as_posix()
    if any(sign in pattern for sign in "*?[") and not path.exists():
        yield from ((name, file) for name, file in _below(root, where) if _matches(name, pattern))
    elif path.is_dir():
        prefix = f"{path.name}/" if (path / "__init__.py").exists() else ""
        yield from ((prefix + name, file) for name, file in _below(path, where))
    elif path.is_file():
        yield path.name, path


def _matches(name: str, pattern: str) -> bool:
    """As a shell with globstar: `**/` stands for any number of folders, `*` for a name without a slash."""
    first, _, rest = pattern.partition("/")
    if first == "**":
        return _matches(name, rest) or ("/" in name and _matches(name.partition("/")[2], pattern))
    head, slash, tail = name.partition("/")
    if not rest:
        return not slash and fnmatch.fnmatchcase(head, first)
    return bool(slash) and fnmatch.fnmatchcase(head, first) and _matches(tail, rest)


def _below(root: Path, where: str) -> Iterator[tuple[str, Path]]:
    """The files below a folder by relative name, without those that are never code."""
    seen = 0
    for folder, inner, names in os.walk(root):
        here = Path(folder)
        if here != root and any(mark in names for mark in _MARKS):
            inner.clear()
            continue
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in _SKIPPED)
        seen += len(inner) + len(names)
        if seen > MOST_SEEN:
            raise UserError(f"{where}: {root} holds too much to look through; `code: [./a.py]` names what is to travel")
        for name in sorted(names):
            if not name.startswith(".") and not name.endswith(".pyc") and (here / name).is_file():
                yield (here / name).relative_to(root).as_posix(), here / name
