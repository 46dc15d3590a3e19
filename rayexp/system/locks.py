"""Locks that go when their holder ends, however it ends: one driver of a run, one packing, one download at a time.

flock, where the file system has it. Some network mounts have none (they answer ENOSYS, ENOLCK or EOPNOTSUPP); there a
lease is taken instead: a file beside the locked one that names its owner's host, process and start time, and is touched
while the owner lives. An owner of this host that is dead blocks nobody, one of another host for LEASE_S at most.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import SoftFileLease, Timeout, lock_descriptor

from rayexp.errors import UserError

DRIVER = "driver.lock"
LEASE_S = 60.0  # an owner on another host that has not touched its lease for so long is gone
PATIENCE_S = 1.0  # a look at a lock (`is_locked`) holds it for a moment, which must not read as a second driver
POLL_S = 0.05
UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})


class HeldError(Exception):
    """Another process holds the lock."""


@dataclass(frozen=True, slots=True)
class Driver:
    """Who drives a run.

    Attributes:
        pid, host: its process.
        token: of this one hold of the lock; a later driver, on whatever host, has another.
    """

    pid: int
    host: str
    token: str


@contextlib.contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[IO[str]]:
    """Hold the lock of a file, which is made where it is missing, and stays. Gives the file, open to read and write.

    Args:
        path: what to lock; its folder must be there.
        patience: seconds to wait for another holder; None: for ever.

    Raises:
        HeldError: another process still holds it after that.
        OSError: the file cannot be made, or not be locked.
    """
    until = None if patience is None else time.monotonic() + patience
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("a+"))
            native = _flock(file.fileno(), until)
            if _is_at(file, path):
                break
            file.close()  # its holder has removed it in the meantime, and others lock the one that is there now
        lease = _lease(path)
        # Where flock works here, a host on which it does not may hold the lease.
        if not native or Path(lease.lock_file).exists():
            try:
                stack.enter_context(lease.acquire(timeout=_patience(lease, until), poll_interval=POLL_S))
            except Timeout:
                raise HeldError(str(path)) from None
        yield file


def _flock(handle: int, until: float | None) -> bool:
    """Lock an open file; False where the file system has no flock (HeldError: the time is over)."""
    while True:
        try:
            if lock_descriptor(handle, blocking=False):
                return True
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return False
            raise
        if until is not None and time.monotonic() > until:
            raise HeldError
        time.sleep(POLL_S)


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lease(path: Path) -> SoftFileLease:
    return SoftFileLease(path.with_name(f"{path.name}.lease"), lease_duration=LEASE_S)


def _patience(lease: SoftFileLease, until: float | None) -> float:
    """Seconds to wait for a lease: one that looks deserted is watched for as long as it takes to be sure."""
    if until is None:
        return -1
    return LEASE_S + 5 if _deserted(lease) else max(0.0, until - time.monotonic())


def _deserted(lease: SoftFileLease) -> bool:
    """Whether a lease has not been touched for long; by two hosts' clocks, so it is a guess."""
    try:
        return time.time() - Path(lease.lock_file).stat().st_mtime > 2 * LEASE_S
    except OSError:
        return False


# ---------------------------------------------------------------------- the driver of a run or a comparison


def share(handle: int) -> None:
    """Share the lock of an open file until it is closed, so that `unshared` sees it in use. On a file system without
    locks there is none."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextlib.contextmanager
def unshared(path: Path) -> Iterator[bool]:
    """Hold a file's lock, and give whether nobody shares it (True also where there is no such file, or no lock)."""
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


@contextlib.contextmanager
def only_driver(root: Path) -> Iterator[Driver]:
    """Hold a directory's lock as its one driver.

    Raises:
        UserError: another process holds it, or it cannot be had.
    """
    path = root / DRIVER
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(locked(path, PATIENCE_S))
        except HeldError:
            by = _read(path)
            who = f"pid {by.pid or 'unknown'}{f' on {by.host}' if by.host else ''}" if by else "pid unknown"
            raise UserError(f"{root.name}: another process is running it ({who})") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be locked ({error.strerror or error})") from error
        me = Driver(os.getpid(), socket.gethostname(), secrets.token_hex(8))
        file.truncate(0)
        file.write(f"{me.pid} {me.host} {me.token}\n")
        file.flush()
        yield me


def is_locked(root: Path) -> bool:
    """Whether a driver holds a directory's lock, as far as this host can see; True where that cannot be told.

    It takes no part in it: any number of processes may look at once, and nothing is written where flock works.
    """
    try:
        with (root / DRIVER).open() as file:
            try:
                # Shared, so that those who look are not in each other's way.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    return True
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return _leased(_lease(root / DRIVER))


def _leased(lease: SoftFileLease) -> bool:
    if not Path(lease.lock_file).exists() or _deserted(lease):
        return False
    try:
        # Whether the owner is alive is the library's to judge: it gives the lease of a dead one.
        with lease.acquire(blocking=False):
            return False
    except (Timeout, OSError):
        return True


def driver_of(root: Path) -> Driver | None:
    """Who holds a directory's lock; None where nobody does."""
    return _read(root / DRIVER) if is_locked(root) else None


def _read(path: Path) -> Driver | None:
    try:
        pid, host, token, *_ = [*path.read_text().split(), "", "", ""]
    except (OSError, ValueError):
        return None
    return Driver(int(pid) if pid.isdecimal() else 0, host, token)
