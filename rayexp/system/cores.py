"""How many CPU cores this process may use: its affinity, and the quota that its control groups set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cores() -> int:
    """Whole cores that this process may keep busy, at least 1."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return there if quota is None else max(1, min(there, int(quota)))


def cpu_quota(process: Path = Path("/proc/self"), top: Path = Path("/")) -> float | None:
    """The smallest CPU quota of this process's control group and its ancestors, in cores; None where there is none.

    Reads both versions of control groups (Linux, Documentation/admin-guide/cgroup-v1 and cgroup-v2).

    Args:
        process: the procfs directory of the process.
        top: the directory that mount points are relative to.
    """
    try:
        members = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return None
    found: list[float] = []
    for mount in mounts:
        left, _, right = mount.partition(" - ")
        kind, _, options = [*right.split(), "", "", ""][:3]
        for _, controllers, path in (m for m in members if len(m) == 3):
            unified = kind == "cgroup2" and controllers == ""
            divided = kind == "cgroup" and "cpu" in options.split(",") and "cpu" in controllers.split(",")
            if unified or divided:
                root, point = (_unescaped(field) for field in left.split()[3:5])
                for folder in _upwards(top / point.lstrip("/"), root, path):
                    quota = _unified(folder) if unified else _divided(folder)
                    found += [] if quota is None else [quota]
    return min(found, default=None)


def _upwards(point: Path, root: str, path: str) -> Iterator[Path]:
    """The folders of a group and its ancestors, as far as they are visible below the mount point."""
    inside = PurePosixPath(path)
    try:
        inside = inside.relative_to(root)  # a container may see only a part of the tree
    except ValueError:
        inside = PurePosixPath()
    if ".." in inside.parts:
        inside = PurePosixPath()
    for part in (inside, *inside.parents):
        yield point / part


def _unified(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max": no quota; no file: the controller is not used here
        return None


def _divided(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _unescaped(field: str) -> str:
    """A field of mountinfo with its octal escapes (for white space and backslashes) decoded."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, char)
    return field
