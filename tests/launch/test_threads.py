"""`threads_per_shard` is decided once in the life of a run, and whoever computes a shard has that many threads."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayexp.config import ExperimentConfig
from rayexp.errors import RunError, UserError
from rayexp.launch import driver, processes
from rayexp.launch.driver import outline, run
from rayexp.launch.job import WorkerJob
from rayexp.launch.verify import verify
from rayexp.runs.integrity import faults
from rayexp.runs.manifest import sealed
from rayexp.runs.run import Run

Tiny = Callable[..., ExperimentConfig]
Command = Callable[..., "subprocess.Popen[str]"]
SHARDS = 4
# More threads than cores, so that those that wait sleep: in this process nothing else tells them to.
SIDE_BY_SIDE = {"lanes": 4}


def without_the_key(made: Run) -> None:
    """As an older rayexp wrote it, in config.yaml and in the checkpoints."""
    lines = made.config_path.read_text().splitlines(keepends=True)
    made.write("config.yaml", "".join(line for line in lines if not line.startswith("threads_per_shard")))
    for folder, state in made.resumable():
        del state["config"]["threads_per_shard"]
        (folder / "state.json").write_text(json.dumps(sealed(state)))


@pytest.fixture
def tiny(tiny: Tiny) -> Tiny:
    return functools.partial(tiny, shards=SHARDS)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The driver finds itself on a machine with so many cores."""
    return lambda cores: monkeypatch.setattr(driver, "cores", lambda: cores)


def test_it_is_decided_when_a_run_starts(tiny: Tiny, machine: Callable[[int], None]) -> None:
    """From the cores that are there; a resume keeps the number, and its worker has it too."""
    machine(2 * SHARDS + 1)
    assert outline(tiny())["threads_per_shard"] == 2
    made = run(tiny(scaling=SIDE_BY_SIDE), argv=[], max_steps=2)
    machine(64)
    for step, config in enumerate((tiny(scaling=SIDE_BY_SIDE), made.config()), 3):
        run(config, argv=[], max_steps=step, resume=made)
        assert made.config().threads_per_shard == 2
        assert {worker["fingerprint"]["threads_per_lane"] for worker in made.meta()["workers"]} == {2}
        assert not faults(made)
    with pytest.raises(UserError, match="threads_per_shard 2 -> 3; allowed"):
        run(tiny(threads_per_shard=3), argv=[], resume=made)


def test_a_run_of_before_goes_on_with_one(tiny: Tiny, machine: Callable[[int], None]) -> None:
    made = run(tiny(threads_per_shard=1), argv=[], max_steps=2)
    without_the_key(made)
    machine(64)
    with pytest.raises(UserError, match="threads_per_shard 1 -> 2; allowed"):
        run(tiny(threads_per_shard=2), argv=[], resume=made)
    run(tiny(), argv=[], max_steps=3, resume=made)
    assert made.config().threads_per_shard == 1
    assert made.meta()["fingerprint"]["threads_per_lane"] == 1
    assert not faults(made)


def test_a_run_that_has_not_begun_may_still_decide(tiny: Tiny, machine: Callable[[int], None]) -> None:
    made = Run.create(tiny(), argv=[])
    machine(2 * SHARDS)
    run(tiny(scaling=SIDE_BY_SIDE), argv=[], max_steps=1, resume=made)
    assert made.config().threads_per_shard == 2


def test_all_trials_of_verify_have_the_first_ones_number(
    tiny: Tiny, machine: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(2 * SHARDS)
    jobs: list[WorkerJob] = []

    def start(job: WorkerJob, world: int) -> list[Any]:
        jobs.append(job)
        raise RunError("the job is all that is asked for")

    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    with pytest.raises(RunError, match="all that is asked for"):
        verify(tiny(epochs=1, scaling=SIDE_BY_SIDE), [0, 2], steps=2, launcher="processes", contrast=False)
    assert [job.config.threads_per_shard for job in jobs] == [2]


def test_processes_decide_by_the_cores_of_all(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayexp.launch.placement import Node

    monkeypatch.setattr("rayexp.launch.verify.here", lambda: Node("here", 3 * SHARDS))
    jobs: list[WorkerJob] = []

    def start(job: WorkerJob, world: int) -> Sequence[Any]:
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "start", start)
    with pytest.raises(KeyboardInterrupt):
        verify(tiny(epochs=1), [2, 1], steps=2, launcher="processes")
    assert (jobs[0].config.threads_per_shard, jobs[0].cpus) == (3, 6)
    assert Run(jobs[0].run).config_path.parent == jobs[0].run


CODE = """
import json, sys, torch
from rayexp.config import ExperimentConfig, parse
from rayexp.engine import checkpoint, runtime
from rayexp.engine.group import WorkerGroup
from rayexp.engine.trainer import Trainer
from rayexp.workloads import open_workload
TREE = json.loads(sys.argv[1])
for threads, lanes in ((1, 1), (2, 1), (2, 2), (2, 4)):
    config = parse({**TREE, "threads_per_shard": threads, "scaling": {"lanes": lanes}}, ExperimentConfig, "test")
    with runtime.configure(config, torch.device("cpu"), config.shards) as here:
        trainer = Trainer(config, open_workload(config), WorkerGroup(), here)
        done = list(trainer.train())[-1]
        print(here.threads, here.replicas, checkpoint.sha(trainer.state().tensors), done.record.val_loss)
"""
IMAGES: dict[str, Any] = {
    "workload": "image_classification",
    "data": {"name": "shapes", "max_train_samples": 48, "max_val_samples": 8, "image_size": 32},
    "model": {"name": "resnet18"},
    "batch_size": 24,
    "shards": SHARDS,
    "optimizer": {},
    "epochs": 1,
}


@pytest.mark.slow
def test_the_number_of_replicas_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two threads a shard, whether there are cores for all of them or not."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    words = [sys.executable, "-c", CODE, json.dumps(IMAGES)]
    rows = [
        line.split() for line in subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    assert [row[:2] for row in rows] == [["1", "1"], ["2", "1"], ["2", "2"], ["2", "4"]]
    assert rows[1][2:] == rows[2][2:] == rows[3][2:]


@pytest.mark.slow
def test_nor_does_the_number_of_workers(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    """In this process a replica has two cores for its two threads (or all there are), with two workers one."""
    (tmp_path / "c.yaml").write_text(tiny(**IMAGES, threads_per_shard=2).to_yaml())
    words = ("--workers", "0,2", "--steps", "2", "--launcher", "processes", "--no-contrast", "--json")
    process = command("verify", "c.yaml", *words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["ok"]
