"""Who listens at a port of this machine. Needs no privileges: sockets of other users are seen, their owners are not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import psutil


def is_ours(host: str, port: int) -> bool | None:
    """Whether every process that could answer at this address of this machine is this user's; None: nobody listens."""
    uids = {_uid(pid) for ip, bound, pid in _listening() if bound == port and _answers_at(ip, host)}
    return uids == {os.getuid()} if uids else None


def _answers_at(ip: str, host: str) -> bool:
    """Whether a socket that is bound to `ip` answers at `host`."""
    return ip in ("0.0.0.0", "::", "*", host, f"::ffff:{host}")


def _listening() -> Iterator[tuple[str, int, int | None]]:
    """Address, port and process (None: another user's) of every listening TCP socket."""
    try:
        found: list[tuple[Any, int | None]] = [(c, c.pid) for c in psutil.net_connections("tcp")]
    except psutil.AccessDenied:  # macOS shows only one's own processes
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                found += [(c, process.pid) for c in process.net_connections("tcp")]
    yield from ((c.laddr.ip, c.laddr.port, pid) for c, pid in found if c.status == psutil.CONN_LISTEN)


def _uid(pid: int | None) -> int | None:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).uids().effective if pid is not None else None
    return None
