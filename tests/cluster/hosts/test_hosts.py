"""Runs over several hosts without shared storage, and what may happen to them.

Each ends with the weights of an undisturbed run in one process, or with one clear line; nothing complete is lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayexp.runs.run import Run, broken

pytestmark = pytest.mark.netns
Wait = Callable[..., Any]
TWO_HOSTS = ("scaling.num_workers=2", "scaling.cpus_per_worker=2")  # each host has two CPUs


class Job:
    """A job sent from the desk, and its run on the head's disk."""

    def __init__(self, lab: Any, wait: Wait, config: Path, name: str, *words: str) -> None:
        self.lab, self.config, self.name = lab, config, name
        self.words = (f"name={name}", *words)
        self.id = self.send()
        self.wait = wait

    def send(self, *options: str) -> str:
        return str(self.desk("submit", str(self.config), *self.words, *options).stdout.strip())

    def desk(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = self.lab.desk.rayexp(*words, "--address", self.lab.url, check=check)
        return done

    def run(self, storage: str = "home/runs") -> Run:
        """The run, as soon as there is one."""
        found = self.wait(
            lambda: [r for r in Run.all(self.lab.head.disk / storage) if f"-{self.name}-" in r.id], "a run"
        )
        return Run(found[-1].root)

    def epochs(self, count: int, storage: str = "home/runs") -> Run:
        """The run, once so many epochs are done."""
        run = self.run(storage)
        self.wait(lambda: len(run.records()) >= count or run.meta()["status"] == "failed", f"{count} epochs", 150)
        assert run.meta()["status"] == "running", self.logs()
        return run

    def end(self) -> subprocess.CompletedProcess[str]:
        """Follow to the end; the job's output and exit code."""
        return self.desk("logs", self.id, "-f", check=False)

    def logs(self) -> str:
        return self.desk("logs", self.id).stdout

    def resume(self, run: Run, *words: str) -> subprocess.CompletedProcess[str]:
        self.words = (*self.words, *words)
        return self.desk("submit", str(self.config), *self.words, "--resume", run.id, "--wait", check=False)


@pytest.fixture
def send(lab: Any, tiny: Path, wait: Wait) -> Callable[..., Job]:
    def send(name: str, *words: str) -> Job:
        return Job(lab, wait, tiny, name, *words)

    return send


def shas(run: Run) -> list[str]:
    return [record.weights_sha for record in run.records()]


def workers(lab: Any, host: str) -> list[int]:
    return list(lab.hosts[host].pids("TrainWorker"))


# ---------------------------------------------------------------------- across hosts


@pytest.mark.parametrize("count", [2, 4])
def test_across_hosts_the_same_bits(
    lab: Any, send: Callable[..., Job], wait: Wait, undisturbed: list[str], count: int
) -> None:
    job = send(f"over{count}", f"scaling.num_workers={count}", f"scaling.cpus_per_worker={4 // count}", "epochs=3")
    wait(lambda: workers(lab, "one") and workers(lab, "two"), "workers on both hosts", 90)
    assert job.end().returncode == 0, job.logs()
    home = job.desk("collect", job.id, "--epochs", "1,3").stdout.strip()  # the job has ended, its driver is gone
    copy = Run(lab.desk.disk / Path(home).relative_to("/mnt"))
    assert shas(copy) == undisturbed[:3]
    assert copy.records()[0].world_size == count
    assert copy.epochs() == [1, 3]
    assert [broken(copy.checkpoint(epoch)) for epoch in (1, 3)] == [None, None]
    again = job.desk("collect", copy.id)
    assert "fetching checkpoints/epoch_002" in again.stderr
    assert "fetching checkpoints/epoch_003" not in again.stderr
    diff = lab.desk.rayexp("diff", f"{copy.id}@1", "@3", "--json")
    assert '"mcnemar_p"' in diff.stdout


# ---------------------------------------------------------------------- faults


def test_a_worker_process_killed(lab: Any, send: Callable[..., Job], undisturbed: list[str]) -> None:
    job = send("killed", *TWO_HOSTS, "epochs=8")
    run = job.epochs(2)
    os.kill(workers(lab, "two")[0], signal.SIGKILL)
    ended = job.end()
    assert ended.returncode == 0, ended.stdout
    assert "workers lost" in ended.stdout
    assert shas(run) == undisturbed[:8]


def test_the_drivers_end_and_a_resume(lab: Any, send: Callable[..., Job], undisturbed: list[str]) -> None:
    job = send("driver", *TWO_HOSTS, "epochs=8")
    run = job.epochs(2)
    for pid in lab.head.pids("-m rayexp train"):
        os.kill(pid, signal.SIGKILL)
    ended = job.end()
    assert ended.returncode not in (0, 2)
    kept = run.epochs()
    assert len(kept) >= 2
    assert [broken(run.checkpoint(epoch)) for epoch in kept] == [None] * len(kept)
    resumed = job.resume(run, "scaling.num_workers=0")
    assert resumed.returncode == 0, resumed.stderr
    assert shas(run) == undisturbed[:8]


def test_a_full_disk(lab: Any, send: Callable[..., Job], undisturbed: list[str]) -> None:
    mount = ["nsenter", "-t", str(lab.head.init), "-m", "mount", "-t", "tmpfs", "-o"]
    (lab.head.disk / "small").mkdir()
    subprocess.run([*mount, "size=20m", "tmpfs", "/mnt/small"], check=True)  # room for three checkpoints
    job = send("full", *TWO_HOSTS, "epochs=6", "storage_path=/mnt/small/runs")
    run = job.run("small/runs")
    ended = job.end()
    assert ended.returncode == 1
    *_, error, how = ended.stdout.strip().splitlines()
    assert "No space left" in error
    assert how == f"go on with: rayexp submit CONFIG --resume {run.id}"  # a job's run goes on as a job
    kept = run.epochs()
    assert len(kept) >= 2
    assert [broken(run.checkpoint(epoch)) for epoch in kept] == [None] * len(kept)
    assert shas(run) == undisturbed[: len(kept)]
    assert not list(run.root.rglob(".tmp-*"))
    subprocess.run([*mount, "remount,size=200m", "tmpfs", "/mnt/small"], check=True)
    resumed = job.resume(run, "scaling.num_workers=0")
    assert resumed.returncode == 0, resumed.stderr
    assert shas(run) == undisturbed[:6]


def test_a_truncated_checkpoint(lab: Any, send: Callable[..., Job], undisturbed: list[str]) -> None:
    job = send("truncated", "epochs=8")
    run = job.epochs(3)
    for pid in lab.head.pids("-m rayexp train"):
        os.kill(pid, signal.SIGKILL)
    job.end()
    newest = run.checkpoint(run.epochs()[-1]) / "state.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    resumed = job.resume(run)
    assert resumed.returncode == 0, resumed.stderr
    assert "passed over" in (run.logs / "rank_0.log").read_text()
    assert shas(run) == undisturbed[:8]


def test_a_whole_node_killed(lab: Any, send: Callable[..., Job], undisturbed: list[str]) -> None:
    job = send("node", "scaling.num_workers=[1,2]", "scaling.cpus_per_worker=2", "epochs=8")
    run = job.epochs(2)
    assert run.records()[0].world_size == 2
    lab.two.unplug()
    try:
        ended = job.end()
        assert ended.returncode == 0, ended.stdout
        assert shas(run) == undisturbed[:8]
        assert run.records()[-1].world_size == 1
    finally:
        lab.reboot("two")


def test_a_link_cut(lab: Any, send: Callable[..., Job], undisturbed: list[str]) -> None:
    job = send("link", "scaling.num_workers=[1,2]", "scaling.cpus_per_worker=2", "epochs=8")
    run = job.epochs(2)
    assert run.records()[0].world_size == 2
    lab.two.link(up=False)
    try:
        ended = job.end()
        assert ended.returncode == 0, ended.stdout
        assert shas(run) == undisturbed[:8]
        assert run.records()[-1].world_size == 1
    finally:
        lab.two.link(up=True)
