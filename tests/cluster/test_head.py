"""Jobs on a real Ray head that wants its token."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from rayexp.runs.integrity import faults
from rayexp.runs.run import Run, broken

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(head: Any, tiny: Path) -> tuple[str, str]:
    """A job that has run to its end: its id, and what `submit --wait` showed."""
    done = head.rayexp("submit", str(tiny), "--wait")
    return done.stdout.strip(), done.stderr


def shas(run: Run) -> list[str]:
    return [r.weights_sha for r in run.records()]


# ---------------------------------------------------------------------- the way there and back


def test_a_job_goes_there_and_its_run_comes_home(
    head: Any, finished: tuple[str, str], undisturbed: list[str], tmp_path: Path
) -> None:
    job, shown = finished
    assert "kB" in shown  # the size of the package
    assert "warning" not in shown  # the head wants the token
    assert "epoch 2" in shown
    remote = Run.all(head.home / "runs")[0]  # relative to home, not to the job's own working directory
    assert remote.meta()["job"] == job
    home = tmp_path / "home"
    assert head.rayexp("collect", job, "--to", str(home), "--epochs", "2").stdout.strip() == str(home / remote.id)
    copy = Run.find(remote.id, home)
    assert copy.epochs() == [2]
    assert broken(copy.checkpoint(2)) is None
    head.rayexp("collect", remote.id[-4:], "--to", str(home))  # by a part of the run's name, and the rest
    assert copy.epochs() == [1, 2]
    for path in remote.root.rglob("*"):
        if path.is_file() and path.name not in ("driver.lock", "progress.json"):
            assert (copy.root / path.relative_to(remote.root)).read_bytes() == path.read_bytes()
    assert shas(copy) == undisturbed[:2]
    diff = head.run(sys.executable, "-m", "rayexp", "diff", f"{copy.root}@1", "@2", "--json", cwd=tmp_path)
    assert json.loads(diff.stdout)["n"] == 64


def test_jobs_and_logs(head: Any, finished: tuple[str, str]) -> None:
    job, _ = finished
    (row,) = [row for row in json.loads(head.rayexp("jobs", "--json").stdout) if row["job"] == job]
    assert (row["status"], row["code"], row["name"]) == ("succeeded", 0, "tiny")
    assert "epoch 1" in head.rayexp("logs", job).stdout
    assert "had ended" in head.rayexp("stop", job).stderr
    nothing = head.rayexp("logs", "nothing", check=False)
    assert nothing.returncode == 2
    assert "nothing" in nothing.stderr


def test_the_exit_code_is_the_jobs_own(head: Any, tiny: Path) -> None:
    done = head.rayexp("submit", str(tiny), "data.name=folder", "data.root=not_there", "--wait", check=False)
    assert done.returncode == 2
    assert "not_there" in done.stderr
    gone = head.rayexp("collect", done.stdout.strip(), check=False)
    assert gone.returncode == 2
    assert "has no run" in gone.stderr


@pytest.mark.slow
def test_ray_job_submit_from_a_plain_checkout(head: Any, tiny: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    shutil.copytree(ROOT / "rayexp", checkout / "rayexp", dirs_exist_ok=True)
    shutil.copy(tiny, checkout / "configs" / "tiny.yaml")
    for ignored in ("data", "runs", ".venv"):
        (checkout / ignored).mkdir(exist_ok=True)
        with (checkout / ignored / "large").open("wb") as file:
            file.truncate(150 * 2**20)
    words = ["ray", "job", "submit", "--address", head.url, "--working-dir", ".", "--"]
    done = head.run(*words, "python", "-m", "rayexp", "train", "configs/tiny.yaml", "name=plain", cwd=checkout)
    assert "succeeded" in done.stdout
    runs = [run for run in Run.all(head.home / "runs") if "-plain-" in run.id]
    assert len(runs) == 1
    assert runs[0].status() == "done"


@pytest.mark.slow
def test_stop_saves_the_present_step_and_resume_goes_on(
    head: Any, tiny: Path, undisturbed: list[str], wait: Callable[..., Any]
) -> None:
    job = head.rayexp("submit", str(tiny), "epochs=12", "name=long").stdout.strip()
    (run,) = wait(lambda: [r for r in Run.all(head.home / "runs") if "-long-" in r.id], "the run")
    wait(run.records, "an epoch")
    head.rayexp("stop", job)
    assert head.rayexp("logs", job, "-f", check=False).returncode == 130
    assert run.meta()["status"] == "stopped"
    assert len(run.records()) < 12
    other = head.rayexp("submit", str(tiny), "epochs=12", "lr=1", "--resume", run.id, "--wait", check=False)
    assert other.returncode == 2
    assert "lr" in other.stderr
    head.rayexp("submit", str(tiny), "epochs=12", "name=long", "--resume", run.id, "--wait")
    assert shas(run) == undisturbed


@pytest.mark.slow
def test_weights_travel_with_a_job_or_are_those_of_a_run_there(
    head: Any, finished: tuple[str, str], tiny: Path, tmp_path: Path
) -> None:
    runs = head.home / "runs"
    first, own = Run.all(runs)[0], tmp_path / "own.safetensors"
    head.run(sys.executable, "-m", "rayexp", "export", f"{first.root}@1", "--to", str(own))
    begun = tensors(first, 1)
    words = [str(tiny), "epochs=1", "schedule.name=constant", "model.freeze=[features.*]", "scaling.num_workers=2"]
    for name, weights in (("sent", str(own)), ("there", f"{first.id}@1")):
        head.rayexp("submit", *words, "--name", name, f"model.weights={weights}", "--wait")
        run = Run.find(name, runs)
        assert run.meta()["weights"]["taken"] == len(begun)
        ended = tensors(run, 1)
        frozen = [key for key in begun if key.startswith("features.")]
        assert frozen
        assert all((ended[key] == begun[key]).all() for key in frozen)
        assert any((ended[key] != begun[key]).any() for key in begun if key not in frozen)
    run = Run.find("sent", runs)
    again = [*words, "epochs=2", f"model.weights={own}", "--resume", run.id, "--wait"]
    head.rayexp("submit", *again)
    assert [record.epoch for record in run.records()] == [1, 2]
    head.run(sys.executable, "-m", "rayexp", "export", f"{first.root}@2", "--to", str(own), "--force")
    refused = head.rayexp("submit", *again, "epochs=3", check=False)
    assert refused.returncode == 2
    assert "has changed since the run began" in refused.stderr
    head.rayexp("collect", run.id, "--to", str(tmp_path / "home"))
    assert faults(Run.find(run.id, tmp_path / "home")) == []


def tensors(run: Run, epoch: int) -> dict[str, Any]:
    """A checkpoint's weights, by name."""
    found = safetensors.numpy.load_file(run.checkpoint(epoch) / "state.safetensors")
    return {name.removeprefix("model."): value for name, value in found.items() if name.startswith("model.")}


# ---------------------------------------------------------------------- a lost connection


class Cable(threading.Thread):
    """A TCP connection to the dashboard that can be cut and mended."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open: list[socket.socket] = []
        self.plugged = True

    def run(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
                if not self.plugged:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self.open += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self.carry, args=(a, b), daemon=True).start()

    def carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.plugged = False
        for end in self.open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.open.clear()


@pytest.mark.slow
def test_following_survives_a_lost_connection(head: Any, tmp_path: Path) -> None:
    cable = Cable(head.dashboard)
    cable.start()
    script = tmp_path / "count.py"
    script.write_text("import time\nfor i in range(12): print('line', i, flush=True); time.sleep(0.5)")
    sent = ["ray", "job", "submit", "--no-wait", "--address", head.url, "--submission-id", "counting", "--"]
    submitted = head.run(*sent, "python", str(script), check=False)
    assert "counting" in submitted.stdout, submitted.stderr
    words = [sys.executable, "-m", "rayexp", "logs", "counting", "-f", "--address", f"http://127.0.0.1:{cable.port}"]
    with subprocess.Popen(
        words, env=head.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as following:
        time.sleep(4)
        cable.cut()
        time.sleep(2)
        cable.plugged = True
        out, said = following.communicate(timeout=60)
    cable.listener.close()
    assert [line for line in out.splitlines() if line.startswith("line")] == [f"line {i}" for i in range(12)]
    assert "the job does not depend on it; trying again" in said
    assert following.returncode == 0


# ---------------------------------------------------------------------- without the token


def test_without_the_token_nothing_is_let_in(head: Any, tiny: Path) -> None:
    before = head.rayexp("jobs", "--json").stdout
    commands = ["submit", str(tiny)], ["jobs"], ["logs", "x"], ["stop", "x"], ["collect", "x"]
    wrong: list[dict[str, str]] = [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}]
    for words, env in zip(commands, wrong * 3, strict=False):
        refused = head.rayexp(*words, check=False, **env)
        assert refused.returncode == 2, words
        assert "token" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        assert head.token not in refused.stdout + refused.stderr
    sent = ["ray", "job", "submit", "--address", head.url, "--", "python", "-V"]
    assert head.run(*sent, check=False, RAY_AUTH_MODE="disabled").returncode != 0
    after = json.loads(head.rayexp("jobs", "--json").stdout)
    assert [row["job"] for row in after] == [row["job"] for row in json.loads(before)]


def test_the_token_is_written_nowhere(head: Any, finished: tuple[str, str], tmp_path: Path) -> None:
    job, shown = finished
    head.rayexp("collect", job, "--to", str(tmp_path))
    secret = head.token.encode()
    for folder in (head.home / "runs", head.temporary, tmp_path):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert secret not in path.read_bytes(), path
    assert head.token not in shown + head.rayexp("logs", job).stdout + head.rayexp("jobs", "--json").stdout
    for pid in head.pids():
        with contextlib.suppress(OSError):
            assert secret not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert stat.S_IMODE((head.home / ".ray" / "auth_token").stat().st_mode) == 0o600


def test_the_dashboard_listens_on_the_loopback_only(head: Any) -> None:
    import psutil

    bound = {
        c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == head.dashboard
    }
    assert bound == {"127.0.0.1"}


# ---------------------------------------------------------------------- a head that is lost


@pytest.mark.slow
def test_a_job_whose_node_is_gone_has_failed_for_everyone(
    bare_head: Any, tmp_path: Path, wait: Callable[..., Any]
) -> None:
    import psutil

    bare_head.start()
    script = tmp_path / "count.py"
    script.write_text("import time\nfor i in range(400): print('line', i, flush=True); time.sleep(0.5)")
    sent = ["ray", "job", "submit", "--no-wait", "--address", bare_head.url, "--submission-id", "counting", "--"]
    bare_head.run(*sent, "python", str(script), check=False)
    words = [sys.executable, "-m", "rayexp", "logs", "counting", "-f", "--address", bare_head.url]
    with subprocess.Popen(
        words, env=bare_head.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as following:
        assert following.stdout is not None
        shown = iter(following.stdout)
        assert any("line 1" in line for line in shown)
        for pid in bare_head.pids():
            if psutil.Process(pid).name() == "raylet":
                psutil.Process(pid).kill()
        _, said = following.communicate(timeout=120)
    assert following.returncode == 1
    assert "error: job counting failed: its node" in said
    assert "goes on" not in said
    (row,) = json.loads(bare_head.rayexp("jobs", "--json").stdout)
    assert (row["job"], row["status"]) == ("counting", "failed")
    logs = bare_head.rayexp("logs", "counting", check=False)
    assert logs.returncode == 1
    assert "job counting failed: its node" in logs.stderr
    assert "had ended (failed)" in bare_head.rayexp("stop", "counting").stderr
