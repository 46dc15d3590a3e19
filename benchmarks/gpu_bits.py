"""The bits of gpu.py: one hash of the weights in every way of computing them, by any number of processes, again and
again, and after a stop."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from bench import Bench

from rayexp.config import ExperimentConfig
from rayexp.engine import checkpoint, runtime
from rayexp.engine.group import WorkerGroup
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.launch import driver, processes
from rayexp.launch.job import WorkerJob
from rayexp.runs.run import Run
from rayexp.system.cores import cores
from rayexp.workloads import open_workload

REPEATS = 30


@contextlib.contextmanager
def trainer(bench: Bench, config: ExperimentConfig, resident: bool = False) -> Iterator[Trainer]:
    """A trainer in this process, whose steps are static on a CPU too."""
    with runtime.configure(config, bench.device, config.shards, static=True) as here:
        workload = open_workload(config)
        if resident and bench.device.type == "cpu":  # the trainer does it for a GPU only
            workload.resident(bench.device)
        yield Trainer(config, workload, WorkerGroup(), here)


def same(bench: Bench, family: str, way: str, sha: str, capture: str | None) -> None:
    """One more hash of a family; the first is what the others must be."""
    first = bench.hashes.setdefault(family, sha)
    captured = capture in ("graph", None)
    notes = [] if sha == first else [f"the first was {first[:12]}"]
    if not captured:
        notes.append(f"capture: {capture}")
    ok = sha == first and (captured or way == "eager")
    bench.say(f"{family}, {way}", sha[:12], ok=ok, note="; ".join(notes))


def bits(bench: Bench) -> None:
    """Every way of computing a step in this process."""
    for family, config in bench.families().items():
        ways: dict[str, dict[str, Any]] = {"eager": {"capture": False}, "captured": {}}
        ways |= {f"{n} streams": {"scaling": {"lanes": n}} for n in (1, 2, 4, 8)}
        if config.workload == "image_classification":
            data = config.data.model_dump()
            ways |= {name: {"data": {**data, "resident": name == "resident"}} for name in ("resident", "staged")}
        for way, changes in ways.items():
            changed = bench.parse({**config.model_dump(mode="json"), **changes})
            bench.attempt(f"{family}, {way}", functools.partial(two_epochs, bench, family, way, changed))


def two_epochs(bench: Bench, family: str, way: str, config: ExperimentConfig) -> None:
    """One way of computing a family's steps."""
    with trainer(bench, config, resident=way == "resident") as one:
        for _ in one.train():
            pass
        same(bench, family, way, checkpoint.sha(one.replicated().weights()), one.stepper.capture)


def repeats(bench: Bench) -> None:
    """The same steps from the same beginning, in one process: a kernel that adds in another order once in a while
    would show."""
    for family, config in bench.families().items():
        bench.attempt(family, functools.partial(repeat, bench, family, config, 3 if bench.small else REPEATS))


def repeat(bench: Bench, family: str, config: ExperimentConfig, count: int) -> None:
    """The first four steps, so many times."""
    with trainer(bench, config) as one:
        files, found = checkpoint.encode(one.state()), set()
        for _ in range(count):
            one.load(checkpoint.decode(files))
            for event in one.train(wanted=lambda step: step == 4):
                if isinstance(event, StepDone) and event.settled and one.global_step == 4:
                    break
            found.add(checkpoint.sha(one.replicated().weights()))
        bench.say(f"{family}, {count} times", " ".join(sha[:12] for sha in sorted(found)), ok=len(found) == 1)


def workers(bench: Bench) -> None:
    """Processes without Ray; on a CPU they are ordinary runs."""
    for number, (family, config) in enumerate(bench.families().items()):
        counts = (2,) if number and family != "lstm tf32" else (1, 2) if bench.small else (1, 2, 4, 8)
        for count in counts:
            bench.attempt(f"{family}, {count} processes", functools.partial(by_processes, bench, family, config, count))


def by_processes(bench: Bench, family: str, config: ExperimentConfig, count: int) -> None:
    """A run by so many processes."""
    run = Run.create(config, argv=sys.argv)
    job = WorkerJob(
        run=run.root.absolute(),
        config=config,
        device="cuda" if bench.device.type == "cuda" else "cpu",
        cpus=max(1, cores() // count),
        timeout_s=60,
    )
    processes.wait(job.run, processes.start(job, count))
    same(bench, family, f"{count} processes", run.records()[-1].weights_sha, run.meta().get("capture"))


def resume(bench: Bench) -> None:
    """Stopped within an epoch and resumed, against a run of its own without a stop."""
    for family in ("resnet18 bf16", "lstm tf32"):
        bench.attempt(family, functools.partial(stop_and_resume, bench, family, bench.families()[family]))


def stop_and_resume(bench: Bench, family: str, config: ExperimentConfig) -> None:
    """The same training twice, the second time in two parts."""
    whole = driver.run(config, argv=sys.argv)
    half = driver.run(config, argv=sys.argv, max_steps=2)
    driver.run(config, argv=sys.argv, resume=half)
    for way, run in (("not stopped", whole), ("stopped after two steps and resumed", half)):
        same(bench, family, way, run.records()[-1].weights_sha, run.meta().get("capture"))
