"""Kill a worker of a run that is under way, for `verify --kill`."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from pathlib import Path


class Killer:
    """Waits for a new run in a folder to do some steps, then sends SIGKILL to its worker on this host, of several the
    one with the highest rank.

    Attributes:
        rank, pid: of the worker that was killed; pid 0: none was.
        elsewhere: the hosts of the workers, where none of them is on this host.
    """

    def __init__(self, folder: Path, known: set[Path], step: int) -> None:
        self.folder, self.known, self.step = folder, known, step
        self.rank = self.pid = 0
        self.elsewhere: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="killer", daemon=True)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            for root in set(self.folder.iterdir()) - self.known:
                trace = root / "trace.jsonl"
                if not trace.exists() or trace.read_text().count("\n") < self.step:
                    continue
                workers = placed(root / "logs")
                here = {rank: pid for rank, (pid, host) in workers.items() if host == socket.gethostname()}
                if not here:
                    self.elsewhere = sorted({host for _, host in workers.values()})
                    return
                rank = max(here)
                self.rank, self.pid = rank, here[rank]  # before anybody can see what comes of it
                try:
                    os.kill(self.pid, signal.SIGKILL)
                except ProcessLookupError:  # the run was faster
                    self.rank = self.pid = 0
                return


def placed(logs: Path) -> dict[int, tuple[int, str]]:
    """Process id and host of the workers of a run's last attempt, by rank; every worker logs them at its start."""
    found = {}
    for log in logs.glob("rank_*.log"):
        entries = re.findall(r"rank (\d+) of \d+: .*, pid (\d+) on (\S+)", log.read_text(errors="replace"))
        if entries:
            rank, pid, host = entries[-1]
            found[int(rank)] = (int(pid), host)
    return found
