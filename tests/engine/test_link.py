"""The workers' link, timed between two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from rayexp.launch.processes import free_port

WORKER = """
import json, sys, torch
from rayexp.config import ExperimentConfig
from rayexp.engine import link
from rayexp.engine.group import join
from rayexp.engine.runtime import configure
rank = int(sys.argv[1])
group = join(2, rank, sys.argv[2], 60)
found = link.measure(group, configure(ExperimentConfig(), torch.device("cpu"), 4), int(sys.argv[3]))
print(json.dumps(found), flush=True)
torch.distributed.destroy_process_group()
"""


def test_a_gradient_buffer_takes_as_long_as_its_bytes_need():
    size = 16 << 20
    address = f"127.0.0.1:{free_port()}"
    args = [address, str(size)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), *args], stdout=subprocess.PIPE, env=environment, text=True
        )
        for rank in range(2)
    ]
    said = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    for found in said:
        assert found["bytes"] == size
        # Waited for, and not only begun: no loopback moves 16 MiB at 50 GB/s.
        assert found["seconds"] > size / 50e9
        assert found["small_seconds"] < found["seconds"]
