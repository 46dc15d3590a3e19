"""Measure the time between two processes of a host with the monotonic clock, which nobody can set."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BOOT = Path("/proc/sys/kernel/random/boot_id")
STAT = Path("/proc/self/stat")


def mark(at: float | None = None) -> dict[str, Any]:
    """A point in time as JSON, for `since` in another process.

    Args:
        at: the value of time.monotonic() at that time; None: now.
    """
    return {"boot": _boot(), "monotonic": time.monotonic() if at is None else at}


def since(moment: Mapping[str, Any]) -> float | None:
    """Seconds since a `mark`; None if it was made on another host or before a reboot: the clocks then differ."""
    seconds = time.monotonic() - float(moment["monotonic"])
    return seconds if moment["boot"] == _boot() and seconds >= 0 else None


def process_began() -> float:
    """The value of time.monotonic() at which this process was started."""
    try:
        # Field 22 of /proc/self/stat (proc(5)): start time in ticks since boot, usually 1/100 s. Count after the name.
        ticks = int(STAT.read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        import psutil

        age = time.time() - psutil.Process().create_time()
    return time.monotonic() - max(0.0, age)


def _boot() -> str:
    try:
        return BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()
