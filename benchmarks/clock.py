"""Is the clock of `rayexp compare` honest? The loop of a finished comparison's cells, timed again from outside.

    python benchmarks/clock.py COMPARE [--cells cpu-inprocess-exact cpu-x2-ddp] [--repeats 3]

Each cell's training loop runs again without Tune, RunWriter or checkpoints: in a process of its own, or, where the cell
has workers, in a plain Ray Train script (`ray.init`, `TorchTrainer`). Nothing that the engine measured is read: one
time.perf_counter is taken when a step's event arrives, from the end of the first step to the end of the epoch's last
one. The table sets steps per second times the batch beside what the comparison says; `agree` is their ratio, in which
the drift of the machine's speed is too (watch.py is without it, and says whether the phases add up).

`without Ray` is the same loop in bare processes that talk over gloo: what Ray itself costs is in none of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rayexp.config import ExperimentConfig, parse
from rayexp.grid.comparison import PLAIN, Comparison
from rayexp.grid.measured import Measured, read_measured
from rayexp.launch.processes import free_port


def words_of(cell: Measured) -> dict[str, Any]:
    """What a process needs to run the cell's loop."""
    scaling = cell.cell.config["scaling"]
    return {
        "config": {**cell.cell.config, "epochs": len(cell.repeats[0].records)},
        "world": max(1, cell.cell.workers),
        "address": f"127.0.0.1:{free_port()}",
        "cpus": scaling["cpus_per_worker"],
    }


def in_processes(words: dict[str, Any]) -> float:
    """Samples per second of the loop in bare processes, by a clock of its own: the median over epochs."""
    return _last_number(
        [[sys.executable, __file__, "--bare", json.dumps(words), str(r)] for r in range(words["world"])]
    )


def on_ray(words: dict[str, Any]) -> float:
    """The same in a plain Ray Train script."""
    return _last_number([[sys.executable, __file__, "--ray", json.dumps(words)]])


def _last_number(commands: list[list[str]]) -> float:
    """Run the commands side by side; the number that the first of them says last."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "RAY_USAGE_STATS_ENABLED": "0"}
    started = [subprocess.Popen(c, stdout=subprocess.PIPE, env=environment, text=True) for c in commands]
    said = [one.communicate()[0] for one in started]
    if any(one.returncode for one in started):
        sys.exit(f"failed: {' '.join(commands[0][1:3])}")
    return float(said[0].split()[-1])


def loop(words: dict[str, Any]) -> float:
    """One worker's part of the loop, timed; torch.distributed is set up where there are several."""
    import time

    import torch

    from rayexp.engine.group import WorkerGroup
    from rayexp.engine.runtime import configure
    from rayexp.engine.trainer import EpochDone, Trainer
    from rayexp.workloads import open_workload

    config = parse(words["config"], ExperimentConfig, "config")
    group = WorkerGroup.join() if words["world"] > 1 else WorkerGroup()
    runtime = configure(config, torch.device("cpu"), config.shards // group.world, words["cpus"])
    rates, samples, began = [], 0, 0.0
    for event in Trainer(config, open_workload(config), group, runtime).train():
        now = time.perf_counter()
        if isinstance(event, EpochDone):
            began = 0.0
        elif not began:
            began, samples = now, 0
        else:
            samples += event.count
            if event.step == event.steps:
                rates.append(samples / (now - began))
    return statistics.median(rates)


def bare(words: dict[str, Any], rank: int) -> None:
    """One bare process; rank 0 prints the rate."""
    from rayexp.engine.group import join, leave

    group = join(words["world"], rank, words["address"], 1800) if words["world"] > 1 else None
    rate = loop(words)
    if rank == 0:
        print(rate)
    if group is not None:
        leave()


def ray_train(words: dict[str, Any]) -> None:
    """A plain Ray Train script; prints the rate of rank 0."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rate"

        def train(_: dict[str, Any]) -> None:
            rank = ray.train.get_context().get_world_rank()
            rate = loop(words)
            if rank == 0:
                found.write_text(str(rate))

        ray.init(address="local", log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        resources = {"CPU": words["cpus"]} if words["cpus"] else None
        scaling = ray.train.ScalingConfig(num_workers=words["world"], resources_per_worker=resources)
        TorchTrainer(
            train,
            train_loop_config={},
            scaling_config=scaling,
            run_config=ray.train.RunConfig(storage_path=folder),
        ).fit()
        print(found.read_text())
        ray.shutdown()


def main() -> None:
    """See the head of this file."""
    if sys.argv[1:2] == ["--bare"]:
        bare(json.loads(sys.argv[2]), int(sys.argv[3]))
        return
    if sys.argv[1:2] == ["--ray"]:
        ray_train(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--cells", nargs="*", help="default: every measured CPU cell but the plain script")
    parser.add_argument("--repeats", type=int, default=3)
    words = parser.parse_args()
    comparison = Comparison(words.comparison)
    cells = [m for m in read_measured(comparison) if m.cell.reduction != PLAIN and m.cell.kind == "cpu"]
    cells = [m for m in cells if not words.cells or m.cell.id in words.cells]
    outside: dict[str, list[float]] = {m.cell.id: [] for m in cells}
    without: dict[str, list[float]] = {m.cell.id: [] for m in cells}
    for number in range(words.repeats):
        for m in cells:
            without[m.cell.id].append(in_processes(words_of(m)))
            outside[m.cell.id].append(on_ray(words_of(m)) if m.cell.workers else without[m.cell.id][-1])
            print(f"round {number + 1}: {m.cell.id} {outside[m.cell.id][-1]:.1f}", file=sys.stderr, flush=True)
    print(f"{'cell':<24}{'compare':>10}{'outside':>10}{'agree':>8}{'without Ray':>13}")
    for m in cells:
        said, found = m.rate().value, statistics.median(outside[m.cell.id])
        bare_rate = statistics.median(without[m.cell.id])
        print(f"{m.cell.id:<24}{said:>10.1f}{found:>10.1f}{said / found:>8.3f}{bare_rate:>13.1f}")


if __name__ == "__main__":
    main()
