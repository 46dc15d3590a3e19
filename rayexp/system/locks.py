"""Locks that are released when their holder ends, even if it is killed: for a run's driver, a packing, a download.

They use flock if the file system supports it. Some network mounts do not (ENOSYS, ENOLCK or EOPNOTSUPP); there a lease
is used: a file beside the locked one that names its owner's host, process and start time, and that is touched while the
owner lives. A dead owner on this host blocks nobody, one on another host at most for LEASE_S.
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
LEASE_S = 60.0  # an owner on another host that has not touched its lease for this long is considered dead
PATIENCE_S = 1.0  # `is_locked` holds the lock for a moment, which must not be mistaken for a second driver
POLL_S = 0.05
UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})


class HeldError(Exception):
    """Another process holds the lock."""


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver of a run: the process that holds its lock.

    Attributes:
        pid: the number of the process; 0 if unknown.
        host: the host it runs on; empty if unknown.
        token: random, new each time the lock is taken, so that two drivers never have the same.
    """

    pid: int
    host: str
    token: str


@contextlib.contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[IO[str]]:
    """Hold the lock of a file. Yields the file, open for reading and writing; it is made if missing, and not removed.

    Args:
        path: the file to lock; its folder must exist.
        patience: seconds to wait for another holder; None: for ever.

    Raises:
        HeldError: another process still holds the lock after that time.
        OSError: the file cannot be made or locked.
    """
    until = None if patience is None else time.monotonic() + patience
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("a+"))
            native = _flock(file.fileno(), until)
            if _is_at(file, path):
                break
            file.close()  # its holder removed it in the meantime; others lock the file that is at this path now
        lease = _lease(path)
        # Even if flock works here, a host on which it does not may hold the lease.
        if not native or Path(lease.lock_file).exists():
            try:
                stack.enter_context(lease.acquire(timeout=_patience(lease, until), poll_interval=POLL_S))
            except Timeout:
                raise HeldError(str(path)) from None
        yield file


def _flock(handle: int, until: float | None) -> bool:
    """Lock an open file; False if the file system has no flock (HeldError: it is still held at `until`)."""
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
    """Seconds to wait for a lease; if it looks deserted, long enough to be sure that it is."""
    if until is None:
        return -1
    return LEASE_S + 5 if _deserted(lease) else max(0.0, until - time.monotonic())


def _deserted(lease: SoftFileLease) -> bool:
    """Whether a lease has not been touched for long. A guess, since it compares the clocks of two hosts."""
    try:
        return time.time() - Path(lease.lock_file).stat().st_mtime > 2 * LEASE_S
    except OSError:
        return False


# ---------------------------------------------------------------------- the driver of a run or a comparison


def share(handle: int) -> None:
    """Take a shared lock of an open file until it is closed, so that `unshared` sees it in use. Does nothing on a file
    system without locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextlib.contextmanager
def unshared(path: Path) -> Iterator[bool]:
    """Hold the lock of a file or a folder, and yield whether nobody else does (True also if it is not there, or there
    is no flock)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        yield True
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:
            free = True
        yield free
    finally:
        os.close(handle)


@contextlib.contextmanager
def only_driver(root: Path) -> Iterator[Driver]:
    """Hold a directory's lock as its only driver.

    Raises:
        UserError: another process holds it or has removed the directory, or it cannot be locked.
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
            if not root.is_dir():
                raise UserError(f"{root.name}: is gone; another process has removed it") from error
            raise UserError(f"{path}: cannot be locked ({error.strerror or error})") from error
        me = Driver(os.getpid(), socket.gethostname(), secrets.token_hex(8))
        file.truncate(0)
        file.write(f"{me.pid} {me.host} {me.token}\n")
        file.flush()
        yield me


def is_locked(root: Path) -> bool:
    """Whether a driver holds a directory's lock, as far as this host can see; True if that cannot be determined.

    Any number of processes may ask at once, and if flock works nothing is written.
    """
    try:
        with (root / DRIVER).open() as file:
            try:
                # A shared lock, so that processes that ask do not block each other.
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
        # The library checks whether the owner is alive; the lease of a dead one can be acquired.
        with lease.acquire(blocking=False):
            return False
    except (Timeout, OSError):
        return True


def driver_of(root: Path) -> Driver | None:
    """The driver that holds a directory's lock; None if nobody does."""
    return _read(root / DRIVER) if is_locked(root) else None


def _read(path: Path) -> Driver | None:
    try:
        pid, host, token, *_ = [*path.read_text().split(), "", "", ""]
    except (OSError, ValueError):
        return None
    return Driver(int(pid) if pid.isdecimal() else 0, host, token)
