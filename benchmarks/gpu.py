"""What the step on a GPU promises, on this machine, in at most eight minutes and without Ray: bits, speed, accuracy.

    python benchmarks/gpu.py --data PACKED_TINY --text PACKED_WIKITEXT --examples PYTORCH_EXAMPLES \\
        [--archive tiny-imagenet-200.zip] [--json FILE] [--only bits speed]
    python benchmarks/gpu.py --small [--json FILE]       every line of it on a CPU, with data that rayexp makes itself

    bits        one hash of the weights: eager, captured, on 1 to 8 streams, resident and staged data; two epochs, each
                with its shorter last batch
    repeats     the same steps again and again, by graphs that are captured already
    workers     the same hash from processes that share the GPU, over gloo
    speed       medians of steady steps, from steps.jsonl, beside both peers
    recipe      configs/tiny_imagenet_fast.yaml by `rayexp train`: accuracy, evaluation, command to first step
    resume      a run that is stopped half way and resumed ends in the same bits

Every section has its share of the time. What fails, or finds no time, is a line of the table like the rest, and the
exit code is then 1. What is under way is told on stderr, and FILE holds all lines so far, so that a command that is cut
off has not been for nothing. On a CPU "capturing" a step is calling the same function, and a graph, streams and tf32
prove nothing; there are no thresholds either.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import gpu_bits
import gpu_speed
import table
import torch
from bench import Bench

SECTIONS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "bits": (90.0, gpu_bits.bits),
    "repeats": (40.0, gpu_bits.repeats),
    "workers": (110.0, gpu_bits.workers),
    "speed": (130.0, gpu_speed.speed),
    "recipe": (75.0, gpu_speed.recipe),
    "resume": (20.0, gpu_bits.resume),
}
"""Each section's share of the time in seconds, and what it does. What one leaves over is there for the next ones."""


def run(bench: Bench, names: Collection[str] = tuple(SECTIONS)) -> None:
    """These sections, one after another."""
    spare = time.monotonic()
    for name, (seconds, section) in SECTIONS.items():
        if name not in names:
            continue
        spare += seconds
        bench.begin(name, seconds, spare)
        bench.attempt("the whole section", functools.partial(section, bench))


def main() -> int:
    """Parse, run, print; 0 where everything is as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Tiny-ImageNet, as `rayexp data fetch` packed it")
    parser.add_argument("--text", type=Path, help="WikiText-2, as `rayexp data fetch` packed it")
    parser.add_argument("--examples", type=Path, help="a checkout of pytorch/examples, for both peers")
    parser.add_argument("--archive", type=Path, help="the Tiny-ImageNet ZIP: JPEGs for the peer")
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=tuple(SECTIONS), help="these sections alone")
    parser.add_argument("--small", action="store_true", help="on a CPU, in two minutes, on data that need no file")
    args = parser.parse_args()
    if not args.small and not (args.data and args.text):
        parser.error("--data and --text are needed, except with --small")
    if not args.small and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; allowed: --small")
    device = torch.device("cpu") if args.small else torch.device("cuda", 0)
    data: dict[str, Any] = {"name": "shapes", "image_size": 32}
    text: dict[str, Any] = {"name": "python_docs", "root": None}
    if not args.small:
        data = {"name": "tiny_imagenet", "root": str(args.data.resolve())}
        text = {"name": "text", "root": str(args.text.resolve())}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(args.small, device, Path(name), data, text, args.examples, args.archive, args.json)
        print(table.HEAD, flush=True)
        run(bench, args.only)
    found = bench.write(complete=True)
    failed = [line for line in bench.lines if not line.ok]
    print(f"\n{len(bench.lines)} lines, {len(failed)} not ok, {found['seconds']} s, {found['date']}")
    print(json.dumps(found["machine"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
