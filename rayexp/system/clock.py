"""The time between two moments of two processes, by a clock that nobody sets: each boot of a host has one."""

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
    """A moment as JSON, for `since` in another process.

    Args:
        at: time.monotonic() then; None: now.
    """
    return {"boot": _boot(), "monotonic": time.monotonic() if at is None else at}


def since(moment: Mapping[str, Any]) -> float | None:
    """Seconds since a moment; None where it was another host's, with which this one has no clock in common."""
    seconds = time.monotonic() - float(moment["monotonic"])
    return seconds if moment["boot"] == _boot() and seconds >= 0 else None


def process_began() -> float:
    """time.monotonic() at which this process was started."""
    try:
        # Field 22 of proc(5): in ticks since boot, to a hundredth of a second. Fields are counted behind the name.
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
