"""Is the clock of `rayexp compare` honest? The loop of a finished comparison's cells, timed again from outside.

    python benchmarks/clock.py COMPARE [--cells cpu-inprocess-exact cpu-x2-ddp] [--repeats 3]

Each cell's training loop runs in fresh processes without Ray, Tune, Recorder or checkpoints (workers talk over gloo).
Nothing that the engine measured is read: one time.perf_counter is taken when a step's event arrives, from the end of
the first step to the end of the epoch's last one. The table sets steps per second times the batch beside what the
comparison says; `agree` is their ratio. It also checks that start-up, phases and shutdown add up to the wall-clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rayexp.analysis.measured import Measured, measure
from rayexp.comparison import PLAIN, Comparison
from rayexp.config import ExperimentConfig, parse
from rayexp.launch.processes import free_port


def outside(cell: Measured, epochs: int) -> float:
    """Samples per second of the cell's loop, by a clock of its own: the median over epochs."""
    world = max(1, cell.cell.workers)
    scaling = cell.cell.config["scaling"]
    words = {
        "config": {**cell.cell.config, "epochs": epochs},
        "world": world,
        "address": f"127.0.0.1:{free_port()}",
        "cpus": scaling["cpus_per_worker"],
    }
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, "--worker", json.dumps(words)]
    workers = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, env=environment, text=True)
        for rank in range(world)
    ]
    said = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit(f"{cell.cell.id}: a worker failed")
    return float(said[0])


def worker(words: dict[str, Any], rank: int) -> None:
    """One worker; rank 0 prints the rate."""
    import torch

    from rayexp.engine.group import Group
    from rayexp.engine.loop import EpochDone, Session
    from rayexp.engine.place import settle
    from rayexp.launch.worker import join
    from rayexp.workloads import open_workload

    config = parse(words["config"], ExperimentConfig, "config")
    device = torch.device("cpu")
    group = join(words["world"], rank, words["address"]) if words["world"] > 1 else Group()
    place = settle(config, device, config.shards // group.world, words["cpus"])
    session = Session(config, open_workload(config), group, place)
    rates = []
    samples = 0
    began = 0.0
    for event in session.train():
        now = time.perf_counter()
        if isinstance(event, EpochDone):
            began = 0.0
            continue
        if not began:
            began, samples = now, 0
            continue
        samples += event.count
        if event.step == event.steps:
            rates.append(samples / (now - began))
    if rank == 0:
        print(statistics.median(rates))
    if group.world > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    """See the head of this file."""
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]), int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--cells", nargs="*", help="default: every measured CPU cell but the plain script")
    parser.add_argument("--repeats", type=int, default=3)
    words = parser.parse_args()
    comparison = Comparison(words.comparison)
    cells = [m for m in measure(comparison) if m.cell.reduction != PLAIN and m.cell.kind == "cpu"]
    cells = [m for m in cells if not words.cells or m.cell.id in words.cells]
    times = {m.cell.id: [] for m in cells}
    for _ in range(words.repeats):
        for m in cells:
            times[m.cell.id].append(outside(m, len(m.repeats[0].records)))
    print(f"{'cell':<24}{'compare':>10}{'outside':>10}{'agree':>8}{'phases off by':>15}{'in neither':>12}")
    for m in cells:
        said, found = m.rate().value, statistics.median(times[m.cell.id])
        off = max(r.unaccounted() for r in m.repeats)
        rest = max(abs(r.shutdown) / r.wall for r in m.repeats)
        print(
            f"{m.cell.id:<24}{said:>10.1f}{found:>10.1f}{said / found:>8.3f}{100 * off:>13.2f} %{100 * rest:>10.1f} %"
        )


if __name__ == "__main__":
    main()
