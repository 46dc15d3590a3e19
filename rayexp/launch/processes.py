"""Workers as processes of this machine, without Ray: for `verify --launcher processes` and for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rayexp.errors import RunError, UserError
from rayexp.launch.faults import LostError
from rayexp.launch.job import WorkerJob
from rayexp.launch.worker_fault import find
from rayexp.system import spawn

# How long the others are waited for once a worker has failed: one that was killed loses its connections before it is
# seen to have ended, and a peer that misses it may be gone sooner.
SETTLE_S = 5.0


class WorkersFailedError(RunError):
    """Workers ended badly.

    Attributes:
        codes: exit codes of the workers that ended by themselves, by rank; minus the number of a signal that ended one.
    """

    def __init__(self, fault: str, advice: str, codes: Mapping[int, int]) -> None:
        super().__init__(fault, advice)
        self.codes = codes

    @property
    def killed(self) -> bool:
        """Whether one of them was killed: that is the reason, whatever happened to the others."""
        return _killed(self.codes)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(job: WorkerJob, world: int) -> list[subprocess.Popen[bytes]]:
    """Start the workers; rank r's output goes to logs/rank_<r>.out of the run, in the place of an earlier attempt's,
    whose errors would be taken for this one's."""
    (job.run / "logs").mkdir(exist_ok=True)
    path = job.write()
    address, me = f"127.0.0.1:{free_port()}", str(os.getpid())
    # Without it gloo looks up this host's name, which need not resolve.
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(world):
            with (job.run / "logs" / f"rank_{rank}.out").open("wb") as out:
                workers.append(
                    subprocess.Popen(
                        spawn.command("rayexp.launch.process_worker", str(path), str(rank), str(world), address, me),
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **loopback},
                    )
                )
    except BaseException:
        _end(workers)
        raise
    return workers


def wait(run: Path, workers: list[subprocess.Popen[bytes]]) -> None:
    """Wait for all workers of a run directory; if one fails, or this is interrupted, end the others.

    Whoever was killed is the cause, whichever of those that failed is seen first; who has only lost touch with another
    one is none.

    Raises:
        UserError: a worker raised it, and none was killed.
        WorkersFailedError: a worker failed; the line ends with its error, or the last line that it printed.
    """
    try:
        while _running(workers) and not _failed(workers):
            time.sleep(0.05)
        until = time.monotonic() + SETTLE_S
        while _running(workers) and not _killed(_failed(workers)) and time.monotonic() < until:
            time.sleep(0.05)
        codes = _failed(workers)
    finally:
        _end(workers)
    if codes:
        outs = {rank: run / "logs" / f"rank_{rank}.out" for rank in codes}
        printed = {rank: out.read_text(errors="replace").strip() for rank, out in outs.items()}
        told = {rank: find(printed[rank]) if code > 0 else None for rank, code in codes.items()}
        rank = min(codes, key=lambda rank: (codes[rank] != -signal.SIGKILL, isinstance(told[rank], LostError), rank))
        found = told[rank]
        if isinstance(found, UserError):
            raise found
        last = found or (printed[rank].splitlines() or ["no output"])[-1]
        raise WorkersFailedError(f"worker {rank} ended with {codes[rank]}: {last}", f" (see {outs[rank]})", codes)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.kill()
        worker.wait()


def _running(workers: Sequence[subprocess.Popen[bytes]]) -> bool:
    return any(worker.poll() is None for worker in workers)


def _killed(codes: Mapping[int, int]) -> bool:
    return -signal.SIGKILL in codes.values()


def _failed(workers: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    codes = {rank: worker.poll() for rank, worker in enumerate(workers)}
    return {rank: code for rank, code in codes.items() if code}
