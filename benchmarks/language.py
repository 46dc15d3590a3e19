"""Training speed of the language model beside pytorch/examples word_language_model, on this machine's CPU.

    python benchmarks/language.py --examples DIR --data DIR [--rounds 3] [--steps 200] [--config FILE] [KEY=VALUE ...]

`--examples` is a checkout of github.com/pytorch/examples, `--data` the folder that `data fetch wikitext2` filled,
or one with train.txt, valid.txt and test.txt. Both train the example's default LSTM on the same words for the same
number of steps, each in a process of its own and in turns. The peer runs its own main.py; the only change is a line
that notes time and loss of each step.

A step's time is from the end of one optimizer step to the end of the next; the first 10 are left out. Reported: the
median step of each, tokens/s, the ratio of every round, and the loss in bins of 20 steps, each round with a seed of its
own for both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

WARM_UP = 10
BIN = 20
ROOT = Path(__file__).resolve().parents[1]

# Lines of the peer's main.py -> what stands there instead.
NOTE = {
    "        total_loss += loss.item()\n": (
        "        total_loss += loss.item()\n"
        "        NOTES.append((time.perf_counter(), loss.item()))\n"
        "        if len(NOTES) == NOTES_WANTED:\n"
        "            import json, sys\n"
        "            print('NOTES ' + json.dumps(NOTES), flush=True)\n"
        "            sys.exit(0)\n"
    ),
}


def peer(examples: Path, data: Path, steps: int, seed: int, options: Sequence[str] = ()) -> list[tuple[float, float]]:
    """(time, loss) after every step of the peer, which is given these further options."""
    source = examples / "word_language_model"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("main.py", "model.py", "data.py"):
            text = (source / name).read_text()
            if name == "main.py":
                for line, instead in NOTE.items():
                    if text.count(line) != 1:
                        sys.exit(f"{source / name}: expected exactly one line {line.strip()!r}; another version?")
                    text = text.replace(line, instead)
                text = text.replace("import argparse\n", f"import argparse\nNOTES, NOTES_WANTED = [], {steps}\n", 1)
            Path(folder, name).write_text(text)
        words = [sys.executable, "main.py", "--data", str(data), "--epochs", "1", "--seed", str(seed)]
        words += ["--log-interval", "1000000", *options]
        out = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    return notes(out)


def ours(config: Path, overrides: list[str], steps: int, seed: int) -> list[tuple[float, float]]:
    """(time, loss) after every step of this project's engine, in-process."""
    words = [sys.executable, __file__, "--child", str(config), str(steps), f"seed={seed}", *overrides]
    return notes(subprocess.run(words, cwd=ROOT, capture_output=True, text=True))


def notes(done: subprocess.CompletedProcess[str]) -> list[tuple[float, float]]:
    """What a child noted."""
    for line in done.stdout.splitlines():
        if line.startswith("NOTES "):
            return [(when, loss) for when, loss in json.loads(line.removeprefix("NOTES "))]
    sys.exit(f"a run failed:\n{done.stderr[-2000:]}")


def child(config: str, steps: str, *overrides: str) -> None:
    """The body of `ours`."""
    import torch

    from rayexp.config import load
    from rayexp.engine.group import WorkerGroup
    from rayexp.engine.runtime import configure
    from rayexp.engine.trainer import StepDone, Trainer
    from rayexp.workloads import open_workload

    settings = load(config, overrides)
    runtime = configure(settings, torch.device("cpu"), settings.shards)
    session = Trainer(settings, open_workload(settings), WorkerGroup(), runtime)
    found = []
    for event in session.train():
        if isinstance(event, StepDone):
            found.append((time.perf_counter(), event.loss))
            if len(found) == int(steps):
                break
    print("NOTES " + json.dumps(found))


def plain_text(root: Path) -> dict[str, str]:
    """The three texts as the peer reads them; words that ours takes for `<unk>` are that for both."""
    from rayexp.config import DataConfig
    from rayexp.data.text import EOS, SPLITS, open_data

    data = open_data(DataConfig(name="text", root=root))
    words = [f"{word} " for word in data.vocabulary]
    words[data.vocabulary.index(EOS)] = "\n"
    return {name: "".join(words[token] for token in getattr(data, name)) for name in SPLITS}


def step_time(run: list[tuple[float, float]]) -> float:
    """Median seconds of a step."""
    times = [when for when, _ in run]
    return statistics.median(b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False))


def bins(runs: list[list[tuple[float, float]]]) -> list[dict[str, float]]:
    """Mean loss of every BIN steps over the runs, with the smallest and the largest run."""
    rows = []
    for start in range(0, len(runs[0]) - BIN + 1, BIN):
        means = [statistics.mean(loss for _, loss in run[start : start + BIN]) for run in runs]
        rows.append({"mean": statistics.mean(means), "min": min(means), "max": max(means)})
    return rows


def machine() -> dict[str, object]:
    """Where this was measured."""
    import torch

    from rayexp.engine.runtime import cpu_capability
    from rayexp.system.cores import cores

    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {"cpu": model, "cores": cores(), "kernels": cpu_capability(), "torch": torch.__version__}


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "wikitext2.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for our configuration, e.g. reduction=ddp")
    args = parser.parse_args()
    from rayexp.config import load
    from rayexp.errors import UserError

    root = args.data.resolve()
    try:
        batch = load(args.config, ["data.name=text", f"data.root={root}"])
        texts = plain_text(root)
    except UserError as error:
        sys.exit(str(error))
    tokens = batch.batch_size * batch.data.bptt
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder)
        for name, text in texts.items():
            (plain / f"{name}.txt").write_text(text, encoding="utf-8")
        overrides = ["data.name=text", f"data.root={root}", *args.overrides]
        for number in range(args.rounds):
            seed = 1111 + number
            pairs.append((peer(args.examples, plain, args.steps, seed), ours(args.config, overrides, args.steps, seed)))
            a, b = (step_time(run) for run in pairs[-1])
            print(
                f"round {number + 1}: peer {a * 1e3:.1f} ms, ours {b * 1e3:.1f} ms a step, {a / b:.2f}x",
                file=sys.stderr,
            )
    times = [[step_time(run) for run in side] for side in zip(*pairs, strict=True)]
    ratios = [a / b for a, b in zip(*times, strict=True)]
    curves = [bins([pair[side] for pair in pairs]) for side in (0, 1)]
    result = {
        "machine": machine(),
        "overrides": args.overrides,
        "rounds": args.rounds,
        "steps": args.steps,
        "step_ms": {name: statistics.median(t) * 1e3 for name, t in zip(("peer", "ours"), times, strict=True)},
        "tokens_per_second": {
            name: tokens / statistics.median(t) for name, t in zip(("peer", "ours"), times, strict=True)
        },
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "loss": [
            {"steps": f"{i * BIN + 1}-{(i + 1) * BIN}", "peer": p, "ours": o}
            for i, (p, o) in enumerate(zip(*curves, strict=True))
        ],
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()), *args.overrides)
    for name in ("peer", "ours"):
        print(f"{name}: {result['step_ms'][name]:8.1f} ms a step {result['tokens_per_second'][name]:8,.0f} tokens/s")
    print(f"ratio: {result['ratio']['median']:.2f}x (rounds {min(ratios):.2f} to {max(ratios):.2f})")
    print(f"{'steps':>9} {'peer: mean (min-max over seeds)':>34} {'ours: mean (min-max over seeds)':>34}")
    for row in result["loss"]:
        sides = (f"{row[s]['mean']:.3f} ({row[s]['min']:.3f}-{row[s]['max']:.3f})" for s in ("peer", "ours"))
        print(f"{row['steps']:>9}" + "".join(f" {side:>34}" for side in sides))


if __name__ == "__main__":
    main()
