"""`rayexp verify` finds differences: three faults are planted in the workers' processes, and it names each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayexp.config import ExperimentConfig
from rayexp.errors import HeadLostError, RunError, Stopped, UserError
from rayexp.launch import processes
from rayexp.launch.killer import Killer
from rayexp.launch.processes import WorkersFailedError
from rayexp.launch.verify import Trial, differences, verify

Tiny = Callable[..., ExperimentConfig]
Command = Callable[..., "subprocess.Popen[str]"]

# Python imports sitecustomize by itself; this one changes a module of rayexp as soon as it has been imported.
HOOK = """
import importlib.abc, importlib.util, sys

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            plant(module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Hook())

def plant(module):
{fault}
"""
FAULTS = {
    "the sum runs in the order of the ranks": (
        "rayexp.engine.reduction",
        """
    # Sums are added in the order in which they arrive, not in the tree's.
    def push(self, node, value):
        if self._values:
            (first, found), = self._values.items()
            self.add(found, value)
            self.free(value)
            value = found
        covered = getattr(self, "covered", 0) + (1 << node[0])
        self.covered = covered
        self._values = {(covered.bit_length() - 1, 0): value}
    module.Forest.push = push
""",
    ),
    "threads fill the cores": (
        "rayexp.engine.runtime",
        """
    import dataclasses
    configure = module.configure
    def planted(config, device, shards, cpus=None):
        runtime = configure(config, device, shards, cpus)
        if cpus is not None:  # not in this process
            module.torch.set_num_threads(2)
        return runtime
    module.configure = planted
""",
    ),
    "augmentation is keyed by the rank": (
        "rayexp.engine.order",
        """
    key = module.key
    rank = int(sys.argv[2]) if "job.json" in " ".join(sys.argv) else 0
    def planted(seed, purpose, *numbers):
        return key(seed, purpose, *numbers, *([rank] * (purpose == "augment" and rank > 0)))
    module.key = planted
""",
    ),
}
IMAGES: dict[str, Any] = {
    "workload": "image_classification",
    "data": {"name": "shapes", "max_train_samples": 128, "max_val_samples": 64},
    "model": {"name": "resnet18"},
    "batch_size": 64,
    "shards": 8,
    "lr": 0.05,
    "optimizer": {},
    "scaling": {"lanes": 1},
}


def step(number: int, **tensors: str) -> dict[str, Any]:
    return {
        "step": number,
        "weights_sha": tensors["a"],
        "tensors": {f"model.{k}": v for k, v in tensors.items()},
        "rate": 1,
    }


def test_the_first_step_and_tensor_that_differ_are_named() -> None:
    one = Trial("0", 0, (step(1, a="x", b="x"), step(2, a="y", b="y")))
    two = Trial("2", 2, (step(1, a="x", b="x"), step(2, a="y", b="z")))
    (found,) = differences([one, one, two])
    assert (found.label, found.step, found.tensor) == ("2", 2, "b")


@pytest.mark.parametrize(("asked", "done"), [(8, 8), pytest.param(100, 10, marks=pytest.mark.slow)])  # the run has ten
def test_equal_in_this_process_and_in_two_one_of_them_killed(tiny: Tiny, asked: int, done: int) -> None:
    verdict = verify(tiny(epochs=1), [0, 2], steps=asked, kill=True, launcher="processes", contrast=False)
    assert verdict.ok
    assert [row["workers"] for row in verdict.rows()] == ["0", "2", "2, one killed"]
    assert all(len(trial.steps) == done for trial in verdict.trials)
    assert f"same bits after each of {done} steps" in verdict.sentence()


@pytest.mark.slow
def test_who_was_killed_decides_although_only_another_was_seen_to_fail(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker on a GPU takes long to end, so a survivor's abort may be all that is seen."""
    true, seen = processes.wait, []

    def wait(run: Path, workers: list[subprocess.Popen[bytes]]) -> None:
        try:
            true(run, workers)
        except WorkersFailedError as error:
            seen.append(dict(error.codes))
            raise WorkersFailedError("worker 0 ended with -6: terminate called", "", {0: -6}) from None

    monkeypatch.setattr(processes, "wait", wait)
    verdict = verify(tiny(epochs=1), [1, 2], steps=4, kill=True, launcher="processes", contrast=False)
    assert verdict.ok
    assert [codes[1] for codes in seen] == [-signal.SIGKILL]


def test_a_worker_that_nobody_killed_fails_the_trial(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(run: Path, workers: list[subprocess.Popen[bytes]]) -> None:
        for worker in workers:
            worker.kill()
            worker.wait()
        raise WorkersFailedError("worker 0 ended with -6: terminate called", "", {0: -6})

    monkeypatch.setattr(processes, "wait", wait)
    with pytest.raises(RunError, match="worker 0 ended with -6: terminate called"):
        verify(tiny(epochs=1), [1, 2], steps=4, kill=True, launcher="processes", contrast=False)


def _sleeping() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])


def _log(root: Path, rank: int, pid: int, host: str) -> None:
    (root / "logs").mkdir(parents=True, exist_ok=True)
    with (root / "logs" / f"rank_{rank}.log").open("a") as file:
        file.write(f"2026-11-26T07:00:00Z rank {rank} of 3: cpu, 1 lanes, pid {pid} on {host}\nother pid 1 on x\n")


def test_only_a_process_of_this_host_is_killed(tmp_path: Path) -> None:
    """The worker with the highest rank is on another host, where its process id means another process."""
    bystander, replaced, ours = _sleeping(), _sleeping(), _sleeping()
    try:
        with Killer(tmp_path, set(), step=2) as killer:
            root = tmp_path / "run"
            _log(root, 0, replaced.pid, socket.gethostname())
            _log(root, 1, replaced.pid, socket.gethostname())
            _log(root, 1, ours.pid, socket.gethostname())  # of a later attempt
            _log(root, 2, bystander.pid, "elsewhere")
            (root / "trace.jsonl").write_text("{}\n{}\n")
            assert ours.wait(20) == -signal.SIGKILL
        assert (killer.rank, killer.pid, killer.elsewhere) == (1, ours.pid, [])
        assert (bystander.poll(), replaced.poll()) == (None, None)
    finally:
        for process in (bystander, replaced, ours):
            process.kill()
            process.wait()


def test_where_no_worker_is_here_nobody_is_killed(tmp_path: Path) -> None:
    bystander = _sleeping()
    try:
        with Killer(tmp_path, set(), step=1) as killer:
            _log(tmp_path / "run", 0, bystander.pid, "two")
            _log(tmp_path / "run", 1, bystander.pid, "one")
            (tmp_path / "run" / "trace.jsonl").write_text("{}\n")
            killer._thread.join(20)
        assert (killer.pid, killer.elsewhere) == (0, ["one", "two"])
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.slow
def test_ddp_is_not_equal_and_is_named(tiny: Tiny) -> None:
    verdict = verify(tiny(reduction="ddp", scaling={"lanes": 1}), [1, 2], steps=3, launcher="processes")
    assert not verdict.ok
    assert verdict.differences[0].label == "2"


def test_a_stopped_verification_offers_nothing_to_go_on_with(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **fields: Any) -> None:
        raise Stopped(signal.SIGTERM, "stopped; saved up to step 2: --resume that goes on")

    monkeypatch.setattr("rayexp.launch.verify.train", stopped)
    with pytest.raises(Stopped) as caught:
        verify(tiny(), [0, 1], launcher="processes")
    assert (caught.value.number, str(caught.value)) == (signal.SIGTERM, "")


@pytest.mark.parametrize("workers", [[0, 1], [1, 0]])
def test_a_failed_trial_tells_the_cause_and_names_nothing_that_is_gone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, workers: list[int]
) -> None:
    """In this process and in a worker's, whose log is in a folder that is removed."""
    monkeypatch.setattr("rayexp.launch.worker.Trainer", None)
    monkeypatch.setattr("rayexp.launch.processes.spawn.command", lambda *_: [sys.executable, "-c", "1 / 0"])
    with pytest.raises(RunError) as caught:
        verify(tiny(), workers, steps=2, launcher="processes")
    expected = {
        0: "TypeError: 'NoneType' object is not callable",
        1: "worker 0 ended with 1: ZeroDivisionError: division by zero",
    }
    assert str(caught.value) == expected[workers[0]]


@pytest.mark.parametrize("kind", [UserError, RunError, HeadLostError])
def test_a_failed_trial_offers_nothing_to_go_on_with(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, kind: type[UserError | RunError]
) -> None:
    def failed(*args: Any, **fields: Any) -> None:
        raise kind("the disk is full", "; saved up to step 2: --resume that goes on")

    monkeypatch.setattr("rayexp.launch.verify.train", failed)
    with pytest.raises(UserError if kind is UserError else RunError, match=r"^the disk is full$"):
        verify(tiny(), [0, 1], launcher="processes")


def test_counts_that_cannot_be_compared_are_refused(tiny: Tiny) -> None:
    for workers, message in (([0], "two or more"), ([0, 3], "does not divide shards"), ([0, 0], "two or more")):
        with pytest.raises(UserError, match=message):
            verify(tiny(), workers, launcher="processes")
    with pytest.raises(UserError, match="--kill"):
        verify(tiny(), [0, 1], kill=True, launcher="processes")
    with pytest.raises(UserError, match=r"--kill: .* has only one"):
        verify(tiny(), [0, 2], steps=1, kill=True, launcher="processes")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_planted_fault_is_found(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    (tmp_path / "c.yaml").write_text(tiny(**IMAGES).to_yaml())
    if fault:
        module, code = FAULTS[fault]
        (tmp_path / "planted").mkdir()
        (tmp_path / "planted" / "sitecustomize.py").write_text(HOOK.format(module=module, fault=code))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'planted'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    args = ("--workers", "0,2", "--steps", "2", "--launcher", "processes", "--no-contrast", "--json")
    # In so few steps two threads may round like one, so a fault has three tries; without a fault one must do.
    for _ in range(3 if fault else 1):
        process = command("verify", "c.yaml", *args)
        out, err = process.communicate(timeout=300)
        if process.returncode == 1:
            break
    assert process.returncode == (1 if fault else 0), err
    assert out, err
    verdict = json.loads(out)
    assert verdict["ok"] is (fault is None)
    if fault:
        (found,) = verdict["differences"]
        assert (found["label"], found["step"]) == ("2", 1)
        assert found["tensor"] == "conv1.weight"
