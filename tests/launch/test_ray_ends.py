"""A Ray of our own and its end: by a signal to everything, by a death in it, or before it is up."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rayexp.config import ExperimentConfig
from rayexp.runs.run import Run
from rayexp.system.locks import is_locked

pytestmark = pytest.mark.ray
Tiny = Callable[..., ExperimentConfig]
Command = Callable[..., "subprocess.Popen[str]"]
Members = Callable[[int], list[psutil.Process]]


@pytest.fixture
def cold(
    tiny: Tiny, tmp_path: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> subprocess.Popen[str]:
    """`rayexp train` with two workers and many epochs, on a Ray that it starts; no snapshots but at the end of them."""
    monkeypatch.setenv("RAY_TMPDIR", str(short_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "c.yaml").write_text(tiny(epochs=2000, scaling={"num_workers": 2}).to_yaml())
    return command("train", "c.yaml")


def begun(tmp_path: Path, until: Callable[..., None]) -> Run:
    until(lambda: any(made.stepping() for made in Run.all(tmp_path / "runs")))
    (made,) = Run.all(tmp_path / "runs")
    return made


def saved(made: Run) -> int:
    """The step of a snapshot inside an epoch, which these runs write only when they are asked to stop."""
    path, state = next(made.resumable())
    assert path.name.startswith("step_")
    return int(state["step"])


@pytest.mark.slow
def test_a_signal_to_every_process_saves(
    cold: subprocess.Popen[str], tmp_path: Path, until: Callable[..., None], members: Members
) -> None:
    made = begun(tmp_path, until)
    everybody = members(cold.pid)
    assert {"gcs_server", "raylet"} < {process.name() for process in everybody}
    for process in everybody:  # as a batch system does
        process.send_signal(signal.SIGTERM)
    out, err = cold.communicate(timeout=90)
    assert cold.returncode == 143, err
    assert made.meta()["status"] == "stopped"
    assert err.splitlines()[-2:] == [
        f"stopped; saved up to step {saved(made)}",
        f"go on with: rayexp train --resume {made.id}",
    ]
    assert not out
    assert "ray" not in err.replace("rayexp", "").lower(), "Ray's chatter belongs into logs/"
    assert (made.logs / "ray.log").exists()
    assert members(cold.pid) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_death_in_ray_is_said_and_ends_the_run_saved(
    cold: subprocess.Popen[str], tmp_path: Path, until: Callable[..., None], members: Members, name: str
) -> None:
    made = begun(tmp_path, until)
    next(process for process in members(cold.pid) if process.name() == name).kill()
    _, err = cold.communicate(timeout=90)
    assert cold.returncode == 1, err
    assert made.meta()["status"] == "failed"
    error = made.meta()["error"]
    assert error.endswith(" has ended")
    assert err.splitlines()[-2:] == [
        f"error: {error}; saved up to step {saved(made)}",
        f"go on with: rayexp train --resume {made.id}",
    ]
    assert not made.stop_path.exists()


@pytest.mark.slow
def test_a_signal_while_ray_starts(
    cold: subprocess.Popen[str], tmp_path: Path, until: Callable[..., None], members: Members
) -> None:
    until(lambda: any(process.name() == "gcs_server" for process in members(cold.pid)))
    cold.terminate()
    _, err = cold.communicate(timeout=90)
    assert cold.returncode == 143, err
    (made,) = Run.all(tmp_path / "runs")
    assert made.meta()["status"] == "stopped"
    assert err.splitlines() == [
        f"stopped; nothing is saved yet in {made.id}",
        f"go on with: rayexp train --resume {made.id}",
    ]
    assert members(cold.pid) == []


@pytest.mark.slow
def test_a_killed_driver_leaves_no_worker_that_writes(
    cold: subprocess.Popen[str], tmp_path: Path, until: Callable[..., None], members: Members
) -> None:
    made = begun(tmp_path, until)
    workers = [process for process in members(cold.pid) if "TrainWorker" in " ".join(process.cmdline())]
    assert len(workers) == 2
    cold.kill()
    until(lambda: not is_locked(made.root))
    time.sleep(0.3)  # a write may have been under way
    before = {path: path.stat().st_mtime_ns for path in made.root.rglob("*")}
    time.sleep(3)  # they did some hundred steps in that time
    assert {path: path.stat().st_mtime_ns for path in made.root.rglob("*")} == before
    until(lambda: not any(process.is_running() for process in workers))


SCRIPT = """
import signal
import psutil, ray
from rayexp.cli._app import _leave
from rayexp.system import signals
from rayexp.launch.on_ray import session

@ray.remote
class Actor:
    def answer(self):
        return 5

before = signal.getsignal(signal.SIGTERM)
with session.session(None):
    assert signal.getsignal(signal.SIGTERM) is before  # Ray sets one of its own
    actor = Actor.remote()
    ray.get(actor.answer.remote())
    for number in signals.SIGNALS:
        for child in psutil.Process().children(recursive=True):
            child.send_signal(number)
    assert ray.get(actor.answer.remote()) == 5
    for child in psutil.Process().children():
        child.kill()
print("here")
_leave(0)
"""


def test_what_happens_to_ray_after_the_work_changes_no_exit_code(alone: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=alone, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "here\n"
