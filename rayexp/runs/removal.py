"""How much room runs take on disk, and how a run is removed: it loses its name first, so that it is there or gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from rayexp.errors import UserError
from rayexp.runs.run import Run
from rayexp.system.disk import MADE, TEMPORARY, remove_directory
from rayexp.system.locks import DRIVER, only_driver

PARTS = ("checkpoints", "predictions", "tb", "logs")


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Bytes of a run's files, links not followed.

    Attributes:
        checkpoints, predictions, tb, logs: of the folder of that name.
        total: of all files of the run.
    """

    checkpoints: int
    predictions: int
    tb: int
    logs: int
    total: int


def disk_use(root: Path) -> DiskUse:
    """Measure a directory; files that go meanwhile do not count."""
    sizes = {part: size(root / part) for part in PARTS}
    return DiskUse(**sizes, total=size(root))


def size(folder: Path) -> int:
    """Bytes of all files in a folder and below; 0 where there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(Path(place) / name).st_size
    return total


def refuse_removal(run: Run, storage: Path) -> None:
    """Refuse to remove what is no run of this folder, or a run that trains (UserError)."""
    if run.root.is_symlink():
        raise UserError(f"{run.root}: a link; the run that it leads to is removed where it lies")
    if run.root.parent.resolve() != storage.resolve():
        raise UserError(
            f"{run.id} is not in {storage} but in {run.root.parent}; --runs {run.root.parent} removes it there"
        )
    try:
        status, host = run.status(), run.meta().get("host")
    except UserError:  # what is damaged may go
        return
    # A copy of a run that trains on another host has no lock.
    if status == "running" and (host == socket.gethostname() or (run.root / DRIVER).exists()):
        where = "" if host == socket.gethostname() else f" on {host}"
        raise UserError(f"{run.id} is running{where}; stop it first")


def remove(run: Run, storage: Path) -> bool:
    """Remove a run; False where another process has removed it meanwhile. It is whole until it is gone from the folder,
    and no driver can take it up meanwhile.

    Raises:
        UserError: see `refuse_removal`; or another process holds its lock.
        WriteError: it cannot be removed.
    """
    refuse_removal(run, storage)
    try:
        with only_driver(run.root):
            remove_directory(run.root)
    except UserError:
        if run.root.exists():
            raise
        return False
    return True


def sweep_removed(storage: Path) -> None:
    """Finish the removals in a folder that were interrupted."""
    for path in storage.glob(f"{TEMPORARY}*"):
        _, _, name = path.name.removeprefix(TEMPORARY).partition("-")
        if MADE.fullmatch(name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
