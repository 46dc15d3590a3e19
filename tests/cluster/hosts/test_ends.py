"""The end of more than a worker: everything at once, the head, a host whose replacement has no data.

The driver runs on the head without being a job, because what answers for jobs ends too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayexp.runs.run import Run

pytestmark = pytest.mark.netns
Wait = Callable[..., Any]
Words = Callable[..., "subprocess.Popen[str]"]
HERE = "/mnt/data"  # on every host's own disk

CONFIG = f"""
name: ends
workload: language_model
data: {{name: text, root: {HERE}, bptt: 20}}
model: {{name: lstm, emsize: 16, nhid: 16, nlayers: 1, dropout: 0.2}}
epochs: 40
batch_size: 16
shards: 4
checkpoint: {{every_steps: 2}}
scaling: {{num_workers: 2, cpus_per_worker: 2}}
max_failures: 3
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ends") / "ends.yaml"
    path.write_text(CONFIG)
    path.parent.chmod(0o755)
    return path


def give_data(folder: Path) -> None:
    folder.mkdir()
    for split, lines in (("train", 600), ("valid", 60), ("test", 60)):
        (folder / f"{split}.txt").write_text("".join(f"one two {i % 7} three {i % 11}\n" for i in range(lines)))


@pytest.fixture
def train(lab: Any, config: Path) -> Iterator[Words]:
    """Start `rayexp train` on the head."""
    started = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = lab.head.command(
            sys.executable, "-m", "rayexp", "train", str(config), *words, "--address", f"{lab.head.address}:6379",
            RAY_gcs_rpc_server_reconnect_timeout_s="30",
        )  # fmt: skip
        started.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def begun(lab: Any, wait: Wait, process: subprocess.Popen[str]) -> Run:
    """The run, once it has an epoch and a snapshot in the next."""

    def ready() -> Run | None:
        assert process.poll() is None, process.communicate()
        found = Run.all(lab.head.disk / "runs")
        return next((run for run in found if run.epochs() and list(run.checkpoints.glob("step_*"))), None)

    run: Run = wait(ready, "a snapshot in the second epoch", 120)
    assert lab.one.pids("TrainWorker")
    assert lab.two.pids("TrainWorker")
    return run


def last_lines(process: subprocess.Popen[str], code: int) -> list[str]:
    """The two lines that the driver said last; it must end with that exit code."""
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return err.splitlines()[-2:]


@pytest.fixture
def undisturbed(config: Path, tmp_path: Path) -> list[str]:
    """The weights after every epoch of a run in one process of this machine."""
    give_data(tmp_path / "data")
    words = ["train", str(config), "scaling.num_workers=0", f"data.root={tmp_path / 'data'}", "--runs", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "rayexp", *words], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return [record.weights_sha for record in Run(Path(done.stdout.strip())).records()]


def test_a_replacement_without_data(lab: Any, train: Words, wait: Wait, undisturbed: list[str]) -> None:
    for host in (lab.one, lab.two):
        give_data(host.disk / "data")
    process = train()
    run = begun(lab, wait, process)
    lab.two.unplug()
    lab.reboot("two")
    line, command = last_lines(process, 2)
    assert line.startswith("error: node two (")
    assert HERE in line
    assert command.startswith(f"go on with: rayexp train --resume {run.id}")
    assert run.meta()["status"] == "failed"
    assert next(run.resumable())[1]["step"] > 0
    kept = len(run.records())
    assert kept >= 1
    give_data(lab.two.disk / "data")
    process = train("--resume", run.id)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.strip().endswith(run.id)
    assert [record.weights_sha for record in run.records()] == undisturbed


def test_the_head_lost(lab: Any, train: Words, wait: Wait) -> None:
    for host in (lab.one, lab.two):
        if not (host.disk / "data").exists():
            give_data(host.disk / "data")
    process = train("epochs=4000")
    run = begun(lab, wait, process)
    before = next(run.resumable())[1]["step"]
    os.kill(lab.head.pids("gcs_server")[0], signal.SIGKILL)
    line, command = last_lines(process, 1)
    assert line.startswith(f"error: Ray's head ({lab.head.address}:6379) has ended; saved up to step ")
    assert command.startswith(f"go on with: rayexp train --resume {run.id}")
    assert run.meta()["status"] == "failed"
    assert next(run.resumable())[1]["step"] > before
    lab.restart()


def test_a_signal_to_everything(lab: Any, train: Words, wait: Wait) -> None:
    for host in (lab.one, lab.two):
        if not (host.disk / "data").exists():
            give_data(host.disk / "data")
    process = train("epochs=4000")
    run = begun(lab, wait, process)
    before = next(run.resumable())[1]["step"]
    for host in lab.hosts.values():
        for pid in host.pids(""):
            with contextlib.suppress(ProcessLookupError):
                if pid != host.init:
                    os.kill(pid, signal.SIGTERM)
    line, command = last_lines(process, 143)
    assert line.startswith("stopped; saved up to step ")
    assert command.startswith(f"go on with: rayexp train --resume {run.id}")
    assert run.meta()["status"] == "stopped"
    assert next(run.resumable())[1]["step"] >= before
    lab.restart()
