"""Workers as processes of this machine, without Ray: for `verify`, for tests, and for machines where Ray is not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayexp import spawn
from rayexp.errors import RunError


def free_port() -> int:
    """A TCP port on the loopback that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(payload: Mapping[str, Any], world: int) -> list[subprocess.Popen[bytes]]:
    """Start the workers; rank r's output goes to logs/rank_<r>.out of the run."""
    run = Path(payload["run"])
    (run / "logs").mkdir(exist_ok=True)
    (run / "payload.json").write_text(json.dumps(payload))
    address = f"127.0.0.1:{free_port()}"
    # gloo otherwise looks up this host's name, which need not resolve.
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}
    workers = []
    for rank in range(world):
        with (run / "logs" / f"rank_{rank}.out").open("ab") as out:
            workers.append(
                subprocess.Popen(
                    spawn.command("rayexp.launch.worker", str(run / "payload.json"), str(rank), str(world), address),
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **loopback},
                )
            )
    return workers


def wait(payload: Mapping[str, Any], workers: list[subprocess.Popen[bytes]]) -> None:
    """Wait for all workers; if one fails, end the others.

    Raises:
        RunError: a worker failed; the line ends with the last line it printed.
    """
    import time

    while any(worker.poll() is None for worker in workers):
        failed = [rank for rank, worker in enumerate(workers) if worker.poll() not in (None, 0)]
        if failed:
            break
        time.sleep(0.05)
    failed = [rank for rank, worker in enumerate(workers) if worker.poll() not in (None, 0)]
    for worker in workers:
        if worker.poll() is None and failed:
            worker.kill()
        worker.wait()
    if failed:
        out = Path(payload["run"]) / "logs" / f"rank_{failed[0]}.out"
        lines = out.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise RunError(f"worker {failed[0]} ended with {workers[failed[0]].returncode}: {lines[-1]} (see {out})")
