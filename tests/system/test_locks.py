"""Locks: one holder at a time, gone with its process, with flock and without."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayexp.config import ExperimentConfig
from rayexp.errors import UserError
from rayexp.runs.run import Run
from rayexp.system import locks
from rayexp.system.locks import HeldError, driver_of, is_locked, locked, only_driver

HOLD = (
    "import sys, time; from pathlib import Path; from rayexp.system.locks import only_driver\n"
    "with only_driver(Path(sys.argv[1])) as me: print(me.token, flush=True); time.sleep(60)"
)
MISSING = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]
Environment = Callable[..., dict[str, str]]


@contextlib.contextmanager
def held(root: Path, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that holds a directory's lock, and its token."""
    with subprocess.Popen([sys.executable, "-c", HOLD, root], stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        try:
            token = process.stdout.readline().strip()
            assert token
            yield process, token
        finally:
            process.kill()


def no_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("number", [0, MISSING[0], *(pytest.param(n, marks=pytest.mark.slow) for n in MISSING[1:])])
def test_one_driver_until_its_process_ends(
    tmp_path: Path, faults: Environment, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    if number:
        no_flock(monkeypatch, number)
    assert not is_locked(tmp_path)
    with held(tmp_path, faults(flock=number) if number else None) as (other, token):
        assert is_locked(tmp_path)
        assert driver_of(tmp_path) == locks.Driver(other.pid, os.uname().nodename, token)
        with (
            pytest.raises(UserError, match=rf"another process is running it \(pid {other.pid} on "),
            only_driver(tmp_path),
        ):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert not is_locked(tmp_path)
        assert driver_of(tmp_path) is None
    with only_driver(tmp_path) as me:
        assert driver_of(tmp_path) == me
        assert me.token != token
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "driver.lock"]


def test_a_driver_on_a_mount_without_flock_is_seen_from_one_with_it(tmp_path: Path, faults: Environment) -> None:
    with held(tmp_path, faults(flock=errno.ENOLCK)):
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match="another process"), only_driver(tmp_path):
            pass


def test_asking_blocks_nobody(tmp_path: Path) -> None:
    (tmp_path / "driver.lock").touch()
    with (tmp_path / "driver.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as `is_locked` does, but for longer
        assert not is_locked(tmp_path)
        timer = threading.Timer(0.2, other.close)
        timer.start()
        with only_driver(tmp_path):
            timer.join()


def test_a_lock_that_cannot_be_read_counts_as_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "driver.lock").touch()
    no_flock(monkeypatch, errno.EIO)
    assert is_locked(tmp_path)
    with pytest.raises(UserError, match=r"driver.lock: cannot be locked \(Input/output error\)"), only_driver(tmp_path):
        pass


def test_the_lease_of_another_host_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_flock(monkeypatch, errno.ENOSYS)
    monkeypatch.setattr(locks, "LEASE_S", 0.6)
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    path, lease = tmp_path / "driver.lock", tmp_path / "driver.lock.lease"
    with locked(path):
        mark = re.sub(r"host=.*", "host=elsewhere", lease.read_text())
    lease.write_text(mark)
    assert is_locked(tmp_path)
    with pytest.raises(UserError, match="another process"), only_driver(tmp_path):
        pass
    old = time.time() - 10
    os.utime(lease, (old, old))
    assert not is_locked(tmp_path)
    with only_driver(tmp_path):
        assert is_locked(tmp_path)


def test_a_lease_is_kept_while_its_owner_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_flock(monkeypatch, errno.ENOSYS)
    monkeypatch.setattr(locks, "LEASE_S", 0.3)
    with only_driver(tmp_path):
        lease = tmp_path / "driver.lock.lease"
        before = lease.stat().st_mtime_ns
        end = time.monotonic() + 20
        while lease.stat().st_mtime_ns == before:
            assert time.monotonic() < end, "the lease is not refreshed"
            time.sleep(0.01)


@pytest.mark.parametrize("number", [0, errno.ENOLCK])
def test_others_wait_for_a_lock_and_have_it_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    if number:
        no_flock(monkeypatch, number)
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with locked(tmp_path / "lock"):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_file_that_its_holder_removes_is_not_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    entered = threading.Event()

    def wait() -> None:
        with locked(path):
            assert path.exists()
            with pytest.raises(HeldError), locked(path, patience=0):
                pass
            entered.set()

    thread = threading.Thread(target=wait)
    with locked(path):
        thread.start()
        time.sleep(0.1)
        assert not entered.is_set()
        path.unlink()
    thread.join(20)
    assert entered.is_set()


# ---------------------------------------------------------------------- a run's state is its lock


def test_a_run_whose_pid_another_process_has_now_has_died(tmp_path: Path) -> None:
    run = Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    assert run.status() == "running"  # not locked yet
    with only_driver(run.root):
        run.update(pid=2**22 + 1)  # nobody's
        assert run.status() == "running"
    run.update(pid=os.getpid())
    assert run.status() == "died"
    run.update(host="elsewhere")
    assert run.status() == "running"
    run.update(status="done")
    assert run.status() == "done"
