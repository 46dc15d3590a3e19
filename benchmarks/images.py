"""ResNet-18 on Tiny-ImageNet: pytorch/examples `imagenet/main.py`, a bare PyTorch loop, and rayexp, taking turns.

    python benchmarks/images.py --examples DIR --archive tiny-imagenet-200.zip --data PACKED [--rounds 3]

The peer runs as it is but for the image size (64 px) and the number of classes, set in a temporary copy. Every
contender trains the same number of steps at batch 256; a run's figure is the median of its steps without the first
two. The table gives medians over rounds and ratios of medians.

    peer       imagenet/main.py with its data loader processes
    bare       the engine's mathematics as a plain loop: packed data, batched augmentation, channels_last, short
               convolutions, batch norm over each shard, fused SGD, the allocator's settings; one batch on all threads
    ddp        rayexp, in-process, reduction: ddp
    exact      rayexp, in-process, reduction: exact (one replica per core)
    ray1       rayexp, one Ray worker, exact
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

CONTENDERS = ("peer", "bare", "ddp", "exact", "ray1")


def peer_script(examples: Path, folder: Path) -> Path:
    """A copy of the example for 64 px images of 200 classes."""
    text = (examples / "imagenet" / "main.py").read_text()
    for old, new in (
        ("(224)", "(64)"),
        ("Resize(256)", "Resize(64)"),
        ("[args.arch]()", "[args.arch](num_classes=200)"),
    ):
        if old not in text:
            raise SystemExit(f"{examples}: imagenet/main.py has no {old!r}; another version of the example?")
        text = text.replace(old, new)
    script = folder / "main.py"
    script.write_text(text)
    return script


def image_folder(archive: Path, folder: Path, images: int) -> Path:
    """Training images as class folders, evenly over the classes; a small val beside them."""
    target = folder / "jpeg"
    with zipfile.ZipFile(archive) as source:
        names = sorted(n for n in source.namelist() if "/train/" in n and n.endswith(".JPEG"))
        by_class: dict[str, list[str]] = {}
        for name in names:
            by_class.setdefault(name.split("/")[2], []).append(name)
        rows = [column for row in zip(*by_class.values(), strict=False) for column in row][:images]
        for split, part in (("train", rows), ("val", rows[:200])):
            for name in part:
                path = target / split / name.split("/")[2] / Path(name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(source.read(name))
    return target


def run_peer(script: Path, jpegs: Path, batch: int, workers: int) -> list[float]:
    """images/s of each step."""
    command = [
        sys.executable,
        str(script),
        str(jpegs),
        "-b",
        str(batch),
        "-j",
        str(workers),
        "--epochs",
        "1",
        "-p",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent)
    times = re.findall(r"Epoch: \[0\]\[ *\d+/ *\d+\]\s+Time +([\d.]+)", done.stdout)
    if not times:
        raise SystemExit(f"the peer failed: {done.stderr[-2000:]}")
    return [batch / float(t) for t in times]


def run_bare(packed: Path, images: int, batch: int) -> list[float]:
    """The bare loop, in a process of its own."""
    command = [sys.executable, __file__, "--bare", str(packed), str(images), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the bare loop failed: {done.stderr[-2000:]}")
    return list(json.loads(done.stdout))


def bare_loop(packed: Path, images: int, batch: int) -> list[float]:
    """images/s of each step of a plain PyTorch loop."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from rayexp.config import ExperimentConfig, parse
    from rayexp.engine import order
    from rayexp.engine.batch_norm import per_shard
    from rayexp.engine.cpu.memory import keep_freed_memory
    from rayexp.engine.rng import Draws
    from rayexp.system.cores import cores
    from rayexp.workloads.image_classification.augmentation import DRAWS, augment
    from rayexp.workloads.image_classification.workload import MEAN, STD, ImageClassification

    data = {"name": "tiny_imagenet", "root": str(packed), "max_train_samples": images}
    config = parse({"data": data, "batch_size": batch}, ExperimentConfig, "benchmark")
    workload = ImageClassification(config)
    split, recipe = workload.data.train, config.data.augment
    keep_freed_memory()
    torch.set_num_threads(cores())
    model, draws = workload.model().train(), Draws()
    draws.begin((), workload.sizes(0, range(config.shards)), torch.device("cpu"))
    per_shard(model, draws)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    permutation = torch.randperm(len(split), generator=torch.Generator().manual_seed(0)).numpy()
    rates = []
    for start in range(0, len(split) - batch + 1, batch):
        began = time.perf_counter()
        samples = permutation[start : start + batch].astype(np.int64)
        uniform = order.uniform_on(torch.tensor(1), torch.from_numpy(samples), DRAWS)
        x = augment(torch.from_numpy(split.read(samples)), recipe, uniform)
        x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(x), torch.from_numpy(split.labels[samples]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        rates.append(batch / (time.perf_counter() - began))
    return rates


def run_rayexp(packed: Path, images: int, batch: int, folder: Path, reduction: str, workers: int) -> list[float]:
    """images/s of each step, as the run's steps.jsonl has them."""
    config = folder / "benchmark.yaml"
    config.write_text("name: benchmark\n")
    words = [
        "data.name=tiny_imagenet",
        f"data.root={packed}",
        f"data.max_train_samples={images}",
        "data.max_val_samples=256",
        f"batch_size={batch}",
        f"reduction={reduction}",
        f"scaling.num_workers={workers}",
        f"storage_path={folder / 'runs'}",
    ]
    before = set((folder / "runs").glob("*"))
    command = [sys.executable, "-m", "rayexp", "train", str(config), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
    if done.returncode:
        raise SystemExit(f"rayexp failed: {done.stderr[-2000:]}")
    (run,) = set((folder / "runs").glob("*")) - before
    rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return [rate for row in rows for rate in step_rates(row, batch)]


def step_rates(row: dict[str, object], batch: int) -> list[float]:
    """Rates of the steps in one line of steps.jsonl (an epoch)."""
    seconds = row["total"]
    if not isinstance(seconds, list):
        raise SystemExit(f"steps.jsonl: no list of seconds under 'total': {sorted(row)}")
    return [batch / float(s) for s in seconds]


def main() -> None:
    """Parse, run in turn, print."""
    if sys.argv[1:2] == ["--bare"]:
        print(json.dumps(bare_loop(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, required=True, help="a checkout of pytorch/examples")
    parser.add_argument("--archive", type=Path, required=True, help="the Tiny-ImageNet ZIP (JPEGs for the peer)")
    parser.add_argument("--data", type=Path, required=True, help="the folder that `rayexp data fetch` filled")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loaders", type=int, default=2, help="the peer's -j")
    parser.add_argument("--only", nargs="*", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    images = args.steps * args.batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script, jpegs = peer_script(args.examples, folder), image_folder(args.archive, folder, images)
        packed = args.data.resolve()
        run = {
            "peer": lambda: run_peer(script, jpegs, args.batch, args.loaders),
            "bare": lambda: run_bare(packed, images, args.batch),
            "ddp": lambda: run_rayexp(packed, images, args.batch, folder, "ddp", 0),
            "exact": lambda: run_rayexp(packed, images, args.batch, folder, "exact", 0),
            "ray1": lambda: run_rayexp(packed, images, args.batch, folder, "exact", 1),
        }
        found: dict[str, list[float]] = {name: [] for name in args.only}
        for number in range(args.rounds):
            for contender in args.only:
                rates = run[contender]()
                found[contender].append(statistics.median(rates[2:]))
                print(
                    f"round {number + 1}: {contender} {found[contender][-1]:.1f} images/s", file=sys.stderr, flush=True
                )
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    first = args.only[0]
    print(f"| contender | images/s (median of {args.rounds}) | range | x {first} |\n| --- | --- | --- | --- |")
    for name, rates in found.items():
        spread, ratio = f"{min(rates):.1f} to {max(rates):.1f}", medians[name] / medians[first]
        print(f"| {name} | {medians[name]:.1f} | {spread} | {ratio:.2f} |")
    if args.json:
        args.json.write_text(json.dumps({"rates": found, "medians": medians}, indent=2))


if __name__ == "__main__":
    main()
