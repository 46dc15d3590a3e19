"""ResNet-18 on more and more cores: rayexp `exact` and `ddp` against pytorch/examples `imagenet/main.py`.

    python benchmarks/cores.py --examples DIR --archive tiny-imagenet-200.zip --data PACKED [--cores 2 4 8 16]

For every number of cores all contenders take turns, held to that many by their CPU affinity (Linux), which is where
rayexp reads how many it has: so `threads_per_shard` and replicas are those of a machine of that size. The peer gets as
many loader processes and intra-op threads as cores. A run's figure is the median of its steps without the first two;
the table has medians over rounds and their ratios to the peer's. Numbers of cores that this machine does not have are
named in the table and not measured.

`--together 0 1 2 3` also measures `exact` with at most 1, 2, 4 and 8 shards a pass, which changes no bit (there is less
to choose the more cores there are: with a core for every shard, each goes by itself). What is faster elsewhere than
engine/passes.py has it (`TOGETHER`) would show here.

`--small` goes through all of this in less than a minute, on drawn images and with a peer of a few lines, on two cores
and on one more than there are: it shows that the script works, and its figures say nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from images import image_folder, peer_script, run_peer, step_rates

from rayexp.system.cores import cores
from rayexp.system.threads import replicas, threads_per_shard

COUNTS = (2, 4, 8, 16)
SHARDS = 8
CONTENDERS = ("peer", "ddp", "exact")
# The command `rayexp`, with another number of shards a pass than it has by itself.
LEVEL = "import sys; from rayexp.engine import passes; passes.TOGETHER = {}; from rayexp.cli import main; main()"
# Shaped like the example, for `--small`: it prints the times of its steps likewise.
SMALL_PEER = """
import sys, time, torch, torchvision
model = torchvision.models.resnet18(num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
batch, steps = int(sys.argv[sys.argv.index("-b") + 1]), 4
for step in range(steps):
    start = time.time()
    loss = torch.nn.functional.cross_entropy(model(torch.randn(batch, 3, 32, 32)), torch.zeros(batch, dtype=torch.long))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"Epoch: [0][{step + 1}/{steps}]  Time {time.time() - start:.3f} (0.0)")
"""


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one number of cores.

    Attributes:
        cores: how many all contenders were held to.
        threads: `threads_per_shard` of rayexp's runs there.
        replicas: side by side.
        rates: images/s of every round, by contender; empty where the machine has fewer cores.
    """

    cores: int
    threads: int
    replicas: int
    rates: dict[str, list[float]]

    def ratio(self, contender: str) -> float:
        """The contender's rate in the peer's."""
        return statistics.median(self.rates[contender]) / statistics.median(self.rates["peer"])


def held_to(count: int, run: Callable[[], list[float]]) -> list[float]:
    """`run` in processes that may use the first `count` cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        return run()
    finally:
        os.sched_setaffinity(0, before)


def run_rayexp(reduction: str, words: Sequence[str], batch: int, folder: Path, level: int | None = None) -> list[float]:
    """images/s of each step, as the run's steps.jsonl has them; `level`: at most 2^level shards a pass."""
    storage = Path(tempfile.mkdtemp(dir=folder))
    config = storage / "benchmark.yaml"
    config.write_text("name: benchmark\n")
    keys = [*words, f"batch_size={batch}", f"shards={SHARDS}", f"reduction={reduction}", f"storage_path={storage}"]
    rayexp = ["-m", "rayexp"] if level is None else ["-c", LEVEL.format(level)]
    command = [sys.executable, *rayexp, "train", str(config), *keys]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"rayexp failed: {done.stderr[-2000:]}")
    (steps,) = storage.glob("*/steps.jsonl")
    return [rate for line in steps.read_text().splitlines() for rate in step_rates(json.loads(line), batch)]


def measure(counts: Sequence[int], run: dict[str, Callable[[int], list[float]]], rounds: int, skip: int) -> list[Row]:
    """A row for each number of cores; without rates where this machine has fewer."""
    rows = []
    for count in counts:
        threads = threads_per_shard(count, SHARDS)
        row = Row(count, threads, replicas(count, threads, SHARDS), {})
        rows.append(row)
        for number in range(rounds if count <= cores() else 0):
            for name in run:
                rates = held_to(count, lambda name=name, count=count: run[name](count))  # type: ignore[misc]
                row.rates.setdefault(name, []).append(statistics.median(rates[skip:]))
                print(
                    f"{count} cores, round {number + 1}: {name} {row.rates[name][-1]:.1f}", file=sys.stderr, flush=True
                )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| cores | threads x replicas | peer, images/s | ddp, images/s | exact, images/s | ddp / peer | exact / peer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        head = f"| {row.cores} | {row.threads} x {row.replicas} |"
        if not row.rates:
            lines.append(f"{head} not measured: this machine has {cores()} | | | | |")
            continue
        rates = " | ".join(f"{statistics.median(row.rates[name]):.1f}" for name in CONTENDERS)
        lines.append(f"{head} {rates} | {row.ratio('ddp'):.2f} | {row.ratio('exact'):.2f} |")
    return "\n".join(lines)


def together_table(rows: Sequence[Row]) -> str:
    """`exact` by the most shards that go through the network together, as Markdown; empty where that was not asked."""
    names = [name for row in rows for name in row.rates if name not in CONTENDERS]
    names = list(dict.fromkeys(names))
    if not names:
        return ""
    lines = [f"| cores | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for row in rows:
        if row.rates:
            rates = " | ".join(f"{statistics.median(row.rates[name]):.1f}" for name in names)
            lines.append(f"| {row.cores} | {rates} |")
    return "\n".join(["", *lines])


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, help="a checkout of pytorch/examples")
    parser.add_argument("--archive", type=Path, help="the Tiny-ImageNet ZIP (JPEGs for the peer)")
    parser.add_argument("--data", type=Path, help="the folder that `rayexp data fetch` filled")
    parser.add_argument("--cores", type=int, nargs="*", help=f"default: {' '.join(map(str, COUNTS))}")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--together", type=int, nargs="*", default=[], help="levels: at most 2^level shards a pass")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.small and None in (args.examples, args.archive, args.data):
        parser.error("--examples, --archive and --data are needed (or --small)")
    with tempfile.TemporaryDirectory() as name:
        folder, batch, rounds = Path(name), args.batch, args.rounds
        if args.small:
            batch, rounds = 16, 1
            script, jpegs = folder / "main.py", folder
            script.write_text(SMALL_PEER)
            words = ["data.name=shapes", "data.max_train_samples=64", "data.max_val_samples=8", "data.image_size=32"]
        else:
            images = args.steps * batch
            script, jpegs = peer_script(args.examples, folder), image_folder(args.archive, folder, images)
            words = ["data.name=tiny_imagenet", f"data.root={args.data.resolve()}"]
            words += [f"data.max_train_samples={images}", "data.max_val_samples=256"]
        run: dict[str, Callable[[int], list[float]]] = {
            "peer": lambda count: run_peer(script, jpegs, batch, count),
            "ddp": lambda count: run_rayexp("ddp", words, batch, folder),
            "exact": lambda count: run_rayexp("exact", words, batch, folder),
        }
        for level in args.together:
            by_level = functools.partial(run_rayexp, "exact", words, batch, folder, level)
            run[f"exact, {1 << level} a pass"] = lambda count, by_level=by_level: by_level()  # type: ignore[misc]
        counts = args.cores or ((min(2, cores()), cores() + 1) if args.small else COUNTS)
        rows = measure(counts, run, rounds, 1 if args.small else 2)
    print(table(rows))
    print(together_table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
