"""The price of `reduction: exact` against `ddp`: ResNet-18, batch 256, 8 shards, in this process and with 2 workers.

    python benchmarks/exact.py --data PACKED [--rounds 5] [--steps 12] [--workers 0 2] [--device cuda]

The contenders run in turn in one call, without Ray (workers are processes that talk over gloo). A run's figures are
medians over its steps without the first two; the table gives medians over rounds. `compute` holds the forward and
backward passes (exact: smaller kernels), `reduce` the exchange and the adding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from rayexp.config import ExperimentConfig, parse
from rayexp.launch import processes
from rayexp.launch.job import WorkerJob
from rayexp.runs.run import Run
from rayexp.system.cores import cores

PHASES = ("data", "compute", "reduce", "optimizer")


def measure(
    data: Path, folder: Path, reduction: str, workers: int, steps: int, batch: int, device: str
) -> dict[str, float]:
    """Median seconds of a step and of its phases."""
    tree = {
        "name": f"{reduction}-{workers}",
        "data": {
            "name": "tiny_imagenet",
            "root": str(data),
            "max_train_samples": steps * batch,
            "max_val_samples": batch,
        },
        "batch_size": batch,
        "reduction": reduction,
        "storage_path": str(folder),
    }
    config = parse(tree, ExperimentConfig, "benchmark").absolute()
    run = Run.create(config, argv=sys.argv)
    job = WorkerJob(run=run.root, config=config, device=device, cpus=max(1, cores() // max(1, workers)))
    processes.wait(job.run, processes.start(job, max(1, workers)))
    (row,) = run.steps()
    return {name: statistics.median(row[name][2:]) for name in ("total", *PHASES)}


def main() -> None:
    """Parse, run in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that `rayexp data fetch` filled")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number in range(args.rounds):
            for workers in args.workers:
                for reduction in ("ddp", "exact") if number % 2 else ("exact", "ddp"):
                    key = f"{workers} workers, {reduction}"
                    one = measure(args.data, Path(name), reduction, workers, args.steps, args.batch, args.device)
                    found.setdefault(key, []).append(one)
                    print(
                        f"round {number + 1}: {key} {args.batch / one['total']:.1f} images/s",
                        file=sys.stderr,
                        flush=True,
                    )
    medians = {key: {p: statistics.median(r[p] for r in rows) for p in rows[0]} for key, rows in found.items()}
    print("| | images/s | ms a step | " + " | ".join(PHASES) + " | against ddp |\n|" + " --- |" * (len(PHASES) + 4))
    for workers in args.workers:
        for reduction in ("ddp", "exact"):
            row = medians[f"{workers} workers, {reduction}"]
            pairs = zip(found[f"{workers} workers, ddp"], found[f"{workers} workers, {reduction}"], strict=True)
            ratio = statistics.median(a["total"] / b["total"] for a, b in pairs)
            parts = " | ".join(f"{1000 * row[p]:.0f}" for p in PHASES)
            shown = f"{args.batch / row['total']:.1f} | {1000 * row['total']:.0f} | {parts} | {ratio:.3f}"
            print(f"| {workers} workers, {reduction} | {shown} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
