"""What the step on a GPU promises, on this machine, in at most eight minutes and without Ray: bits, speed, accuracy.

    python benchmarks/gpu.py --data PACKED_TINY --text PACKED_WIKITEXT --examples PYTORCH_EXAMPLES \\
        [--archive tiny-imagenet-200.zip] [--json FILE]
    python benchmarks/gpu.py --small [--json FILE]       every line of it on a CPU, with data that rayexp makes itself

    bits        one hash of the weights: eager, captured, on 1 to 8 streams, resident and staged data; two epochs, each
                with its shorter last batch
    repeats     the same steps again and again, by graphs that are captured already
    workers     the same hash from processes that share the GPU, over gloo
    speed       medians of steady steps, from steps.jsonl, beside both peers
    recipe      configs/tiny_imagenet_fast.yaml by `rayexp train`: accuracy, evaluation, command to first step
    resume      a run that is stopped half way and resumed ends in the same bits

Every section has its share of the time. What fails, or finds no time, is a line of the table like the rest, and the
exit code is then 1. On a CPU "capturing" a step is calling the same function, and a graph, streams and tf32 prove
nothing; there are no thresholds either.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import images
import language
import table
import torch
from table import Line, Speed

from rayexp.config import ExperimentConfig, load, parse
from rayexp.engine import checkpoint, runtime
from rayexp.engine.group import WorkerGroup
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.launch import driver, processes
from rayexp.launch.job import WorkerJob
from rayexp.runs.run import Run
from rayexp.system.cores import cores
from rayexp.workloads import open_workload

T = TypeVar("T")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SECONDS = {"bits": 90.0, "repeats": 40.0, "workers": 110.0, "speed": 130.0, "recipe": 75.0, "resume": 20.0}
"""Each section's share. What one leaves over is there for the next ones."""
WARM_UP = 10  # steps that are not counted: kernels are chosen, graphs captured
REPEATS = 30
ANOTHER_S = 60.0  # what a second training of 20 epochs takes, with its start
WHOLE = 100_000  # images of Tiny-ImageNet; an accuracy is expected of all of them only


@dataclass
class Bench:
    """What is measured, and what has been found.

    Attributes:
        data, text: keys of `data` for images and for text.
    """

    small: bool
    device: torch.device
    folder: Path
    data: Mapping[str, Any]
    text: Mapping[str, Any]
    examples: Path | None = None
    archive: Path | None = None
    lines: list[Line] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    section: str = ""
    until: float = 0.0

    # ------------------------------------------------------------------ sections and their lines

    def run(self) -> None:
        """All sections, one after another."""
        spare = time.monotonic()
        for name in SECONDS:
            self.section, spare = name, spare + SECONDS[name]
            self.until = math.inf if self.small else spare
            self.attempt("the whole section", getattr(self, name))

    def say(self, what: str, value: float | str | None, unit: str = "", **more: Any) -> None:
        """Add a line, and print it at once."""
        self.lines.append(Line(self.section, what, value, unit, **more))
        print(self.lines[-1].row(), flush=True)

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """What `work` returns. Whatever goes wrong in it is a line of the table, and the others are still tried."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            if time.monotonic() > self.until:
                raise TimeoutError(f"no time was left of the section's {SECONDS[self.section]:.0f} s")
            return work()
        except (Exception, SystemExit) as error:
            lines = str(error).strip().splitlines() or [""]
            self.say(what, None, ok=False, note=f"{type(error).__name__}: {lines[0][:300]}")
            return None

    # ------------------------------------------------------------------ configurations

    def families(self) -> dict[str, ExperimentConfig]:
        """A configuration of each kind of model, small enough for a few steps."""
        rows = 6 * 35 + 12  # six windows and a short one
        text = {
            "workload": "language_model",
            "data": {**self.text, "max_train_tokens": 16 * rows, "max_val_tokens": 2000, "bptt": 35},
            "batch_size": 16,
            "lr": 1.0,
            "optimizer": {"momentum": 0, "clip": 0.25},
        }
        size = {"emsize": 32, "nhid": 32} if self.small else {"emsize": 200, "nhid": 200}
        batch, shards, whole = (16, 4, 2) if self.small else (256, 8, 3)
        picture = {
            "data": {**self.data, "max_train_samples": whole * batch + batch * 5 // 8, "max_val_samples": batch},
            "model": {"name": "resnet18"},
            "batch_size": batch,
            "shards": shards,
            "lr": 0.01,
            "optimizer": {"nesterov": True},
        }
        transformer = {"name": "transformer", "nlayers": 2, "nhead": 4, "context": 35, "dropout": 0.2, **size}
        adamw = {"name": "adamw", "clip": 1.0}
        trees = {
            "resnet18 bf16": {**picture, "precision": "bf16"},
            "resnet18 tf32": {**picture, "precision": "tf32"},
            "lstm tf32": {**text, "precision": "tf32"},
            "gru bf16": {**text, "precision": "bf16"},
            "rnn_tanh fp32": {**text, "lr": 0.1},
            "transformer bf16": {**text, "precision": "bf16", "lr": 1e-3, "optimizer": adamw, "model": transformer},
        }
        for name, tree in trees.items():
            tree.setdefault("model", {"name": name.split()[0], "nlayers": 2, "dropout": 0.2, **size})
        return {name: self.parse(tree) for name, tree in trees.items()}

    def parse(self, tree: Mapping[str, Any]) -> ExperimentConfig:
        """A configuration whose runs are thrown away. On a CPU static steps are made of PyTorch's operations alone, and
        so must be what they are compared with."""
        here: dict[str, Any] = {"storage_path": str(self.folder / "runs")}
        if self.small:
            here["threads_per_shard"] = 1
        return parse({"epochs": 2, "cpu_kernels": False, **tree, **here}, ExperimentConfig, "benchmark").absolute()

    # ------------------------------------------------------------------ bits

    @contextlib.contextmanager
    def trainer(self, config: ExperimentConfig, resident: bool = False) -> Iterator[Trainer]:
        """A trainer in this process, whose steps are static on a CPU too."""
        with runtime.configure(config, self.device, config.shards, static=True) as here:
            workload = open_workload(config)
            if resident and self.device.type == "cpu":  # the trainer does it for a GPU only
                workload.resident(self.device)
            yield Trainer(config, workload, WorkerGroup(), here)

    def same(self, family: str, way: str, sha: str, capture: str | None) -> None:
        """One more hash of a family; the first is what the others must be."""
        first = self.hashes.setdefault(family, sha)
        captured = capture in ("graph", None)
        notes = [] if sha == first else [f"the first was {first[:12]}"]
        if not captured:
            notes.append(f"capture: {capture}")
        ok = sha == first and (captured or way == "eager")
        self.say(f"{family}, {way}", sha[:12], ok=ok, note="; ".join(notes))

    def bits(self) -> None:
        """Every way of computing a step in this process."""
        for family, config in self.families().items():
            ways: dict[str, dict[str, Any]] = {"eager": {"capture": False}, "captured": {}}
            ways |= {f"{n} streams": {"scaling": {"lanes": n}} for n in (1, 2, 4, 8)}
            if config.workload == "image_classification":
                data = config.data.model_dump()
                ways |= {name: {"data": {**data, "resident": name == "resident"}} for name in ("resident", "staged")}
            for way, changes in ways.items():
                changed = self.parse({**config.model_dump(mode="json"), **changes})
                self.attempt(f"{family}, {way}", functools.partial(self.two_epochs, family, way, changed))

    def two_epochs(self, family: str, way: str, config: ExperimentConfig) -> None:
        """One way of computing a family's steps."""
        with self.trainer(config, resident=way == "resident") as one:
            for _ in one.train():
                pass
            self.same(family, way, checkpoint.sha(one.replicated().weights()), one.stepper.capture)

    def repeats(self) -> None:
        """The same steps from the same beginning, in one process: a kernel that adds in another order once in a while
        would show."""
        for family, config in self.families().items():
            self.attempt(family, functools.partial(self.repeat, family, config, 3 if self.small else REPEATS))

    def repeat(self, family: str, config: ExperimentConfig, count: int) -> None:
        """The first four steps, so many times."""
        with self.trainer(config) as one:
            files, found = checkpoint.encode(one.state()), set()
            for _ in range(count):
                one.load(checkpoint.decode(files))
                for event in one.train(wanted=lambda step: step == 4):
                    if isinstance(event, StepDone) and event.settled and one.global_step == 4:
                        break
                found.add(checkpoint.sha(one.replicated().weights()))
            self.say(f"{family}, {count} times", " ".join(sha[:12] for sha in sorted(found)), ok=len(found) == 1)

    def workers(self) -> None:
        """Processes without Ray; on a CPU they are ordinary runs."""
        for number, (family, config) in enumerate(self.families().items()):
            counts = (2,) if number and family != "lstm tf32" else (1, 2) if self.small else (1, 2, 4, 8)
            for count in counts:
                self.attempt(
                    f"{family}, {count} processes", functools.partial(self.by_processes, family, config, count)
                )

    def by_processes(self, family: str, config: ExperimentConfig, count: int) -> None:
        """A run by so many processes."""
        run = Run.create(config, argv=sys.argv)
        job = WorkerJob(
            run=run.root.absolute(),
            config=config,
            device="cuda" if self.device.type == "cuda" else "cpu",
            cpus=max(1, cores() // count),
            timeout_s=60,
        )
        processes.wait(job.run, processes.start(job, count))
        self.same(family, f"{count} processes", run.records()[-1].weights_sha, run.meta().get("capture"))

    # ------------------------------------------------------------------ speed

    def speed(self) -> None:
        """Both peers, then rayexp in this process by its ordinary launcher."""
        batch, steps = (16, 8) if self.small else (256, 40)
        picture = {
            "data": {**self.data, "max_train_samples": batch * steps, "max_val_samples": batch},
            "batch_size": batch,
            "lr": 0.01,
            "epochs": 2 if self.small else 3,
        }
        peers = {"images": self.peer("images", lambda: self.image_peer(batch, steps))}
        tokens, words = self.default_lstm()
        peers["tokens"] = self.peer("tokens", lambda: self.text_peer(words, 60 if self.small else 200))
        ddp = {"reduction": "ddp"}
        for what, tree, unit, least, aim, times in (
            ("resnet18 exact bf16", {**picture, "precision": "bf16"}, "images", 45_000, 60_000, 3),
            ("resnet18 ddp bf16", {**picture, **ddp, "precision": "bf16"}, "images", 60_000, 80_000, 3),
            ("resnet18 ddp bf16 compiled", {**picture, **ddp, "precision": "bf16", "compile": True}, "images",
             60_000, 80_000, 3),
            ("resnet18 exact tf32", {**picture, "precision": "tf32"}, "images", 35_000, 45_000, 0),
            ("default LSTM exact tf32", tokens, "tokens", 130_000, 180_000, 1),
            ("default LSTM ddp tf32", {**tokens, **ddp}, "tokens", 250_000, 350_000, 1),
        ):  # fmt: skip
            needed = Speed(0, 0, 0) if self.small else Speed(least, aim, times)
            self.attempt(what, functools.partial(self.rate, what, tree, unit, peers[unit], needed))

    def rate(self, what: str, tree: Mapping[str, Any], unit: str, peer: float | None, needed: Speed) -> None:
        """Train, and say how fast that was."""
        run = driver.run(self.parse(tree), argv=sys.argv)
        rate, capture = steady(run), run.meta().get("capture")
        met = rate >= needed.least and (peer is None or rate >= needed.times * peer)
        note = f"capture: {capture}" if capture else ""
        self.say(what, rate, f"{unit}/s", ok=met, needed=str(needed), peer=peer, note=note)

    def peer(self, unit: str, measure: Callable[[], float | None]) -> float | None:
        """A peer's rate; None where it was not given, or failed."""

        def work() -> float | None:
            rate = measure()
            self.say(f"the peer in {unit}", rate, f"{unit}/s", note="" if rate else "peer: not given")
            return rate

        return self.attempt(f"the peer in {unit}", work)

    def image_peer(self, batch: int, steps: int) -> float | None:
        """imagenet/main.py at 64 px."""
        if self.examples is None or self.archive is None:
            return None
        jpegs = images.image_folder(self.archive, self.folder, batch * steps)
        rates = images.run_peer(images.peer_script(self.examples, self.folder), jpegs, batch, min(16, cores()))
        return statistics.median(rates[min(WARM_UP, len(rates) // 2) :])

    def default_lstm(self) -> tuple[dict[str, Any], Path | None]:
        """The default LSTM's configuration, and the folder with the peer's texts."""
        keys = [f"data.{name}={'null' if value is None else value}" for name, value in self.text.items()]
        tree = load(CONFIGS / "wikitext2.yaml", keys).model_dump(mode="json")
        tree["data"] |= {"max_train_tokens": (40 if self.small else 200) * 700, "max_val_tokens": 20_000}
        return {**tree, "precision": "tf32", "epochs": 2}, self.text.get("root")

    def text_peer(self, root: Path | None, steps: int) -> float | None:
        """word_language_model/main.py with its defaults: 20 columns, 35 words."""
        if self.examples is None or root is None:
            return None
        plain = self.folder / "plain"
        plain.mkdir()
        for name, words in language.plain_text(Path(root)).items():
            (plain / f"{name}.txt").write_text(words, encoding="utf-8")
        device = ["--accel"] if self.device.type == "cuda" else []
        return 20 * 35 / language.step_time(language.peer(self.examples, plain, steps, 1111, device))

    # ------------------------------------------------------------------ the recipe, resuming

    def recipe(self) -> None:
        """The whole of a training by the command."""
        least = {"tiny_imagenet_fast": 57.5, "tiny_imagenet": 48.0}
        for name in ("quickstart",) if self.small else tuple(least):
            if name == "tiny_imagenet" and self.until - time.monotonic() < ANOTHER_S:
                self.say(name, None, note="left out: no time for a second training")
                continue
            self.attempt(name, lambda: self.say_recipe(name, self.train(name), least.get(name, 0.0)))  # noqa: B023

    def train(self, name: str) -> Run:
        """`rayexp train` of a configuration of this project; its finished run."""
        storage = self.folder / name
        words = [f"data.{key}={value}" for key, value in self.data.items()] + [f"storage_path={storage}"]
        if self.small:
            words += ["batch_size=16", "data.max_train_samples=64", "data.max_val_samples=32"]
        command = [sys.executable, "-m", "rayexp", "train", str(CONFIGS / f"{name}.yaml"), *words]
        left = None if self.small else max(30.0, self.until - time.monotonic())
        env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=left)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
        (run,) = Run.all(storage)
        return run

    def say_recipe(self, name: str, run: Run, least: float) -> None:
        """What a finished run tells."""
        records, data = run.records(), run.data()
        top1, whole = records[-1].metrics["acc1"], data["train_samples"] >= WHOLE
        self.say(
            f"{name}, top-1 after {len(records)} epochs",
            top1,
            "%",
            ok=not whole or top1 >= least,
            needed=f"{least}" if whole else "",
            note=f"{steady(run):,.0f} images/s, {sum(r.seconds['total'] for r in records):.1f} s"
            + ("" if whole or self.small else f"; {data['train_samples']:,} images are not all, so nothing is needed"),
        )
        images_each = 10_000 / data["val_samples"]
        evaluated = statistics.median(r.seconds["evaluate"] for r in records[1:] or records) * images_each
        started = float(run.meta()["startup_seconds"]["to_first_step"])
        for what, seconds, most, aim in (("evaluation of 10,000 images", evaluated, 0.3, ""),
                                         ("command to first step", started, 8.0, ", aim 6")):  # fmt: skip
            needed = "" if self.small else f"at most {most:g}{aim}"
            self.say(f"{name}, {what}", seconds, "s", ok=self.small or seconds <= most, needed=needed)

    def resume(self) -> None:
        """Stopped within an epoch and resumed, against a run of its own without a stop."""
        for family in ("resnet18 bf16", "lstm tf32"):
            self.attempt(family, functools.partial(self.stop_and_resume, family, self.families()[family]))

    def stop_and_resume(self, family: str, config: ExperimentConfig) -> None:
        """The same training twice, the second time in two parts."""
        whole = driver.run(config, argv=sys.argv)
        half = driver.run(config, argv=sys.argv, max_steps=2)
        driver.run(config, argv=sys.argv, resume=half)
        for way, run in (("not stopped", whole), ("stopped after two steps and resumed", half)):
            self.same(family, way, run.records()[-1].weights_sha, run.meta().get("capture"))


def steady(run: Run) -> float:
    """Samples per second: the median over the steps of a run without the first ones."""
    rates = [count / total for line in run.steps() for count, total in zip(line["count"], line["total"], strict=True)]
    return statistics.median(rates[min(WARM_UP, len(rates) // 2) :])


def main() -> int:
    """Parse, run, print; 0 where everything is as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Tiny-ImageNet, as `rayexp data fetch` packed it")
    parser.add_argument("--text", type=Path, help="WikiText-2, as `rayexp data fetch` packed it")
    parser.add_argument("--examples", type=Path, help="a checkout of pytorch/examples, for both peers")
    parser.add_argument("--archive", type=Path, help="the Tiny-ImageNet ZIP: JPEGs for the peer")
    parser.add_argument("--json", type=Path, help="write the table to this file too")
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
    began = time.monotonic()
    print(table.HEAD, flush=True)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(args.small, device, Path(name), data, text, args.examples, args.archive)
        bench.run()
    failed = [line for line in bench.lines if not line.ok]
    seconds = round(time.monotonic() - began, 1)
    found = {"small": args.small, "seconds": seconds, "ok": not failed, **table.to_json(bench.lines, device)}
    print(f"\n{len(bench.lines)} lines, {len(failed)} not ok, {seconds} s, {found['date']}")
    print(json.dumps(found["machine"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
