"""Runs made by hand, and a real Ray head behind a token."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexp.config import ExperimentConfig
from rayexp.runs.records import EpochRecord, Predictions
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter

# What decides where a home, a token and a Ray are found.
AROUND = ("HOME", "RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


@pytest.fixture
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's own environment: no Ray, no token, and a home and temporary folder of the test's."""
    for name in (*AROUND, "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile goes with the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, and no Ray named in the environment."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def write_run(storage: Path, epochs: int, run: Run | None = None) -> Run:
    """A run directory as training leaves it, without training; with `run`, more epochs of that one."""
    rng = np.random.default_rng(7)
    run = run or Run.create(ExperimentConfig(name="made", storage_path=storage), argv=["rayexp", "train"])
    writer = RunWriter(run)
    writer.begin({"status": "running"}, {"kind": "images", "val_sha": "v", "classes": [], "val_names": []})
    for epoch in range(1, epochs + 1):
        tensors = rng.bytes(300_000)
        sha = hashlib.sha256(tensors).hexdigest()
        state = {
            "epoch": epoch, "step": epoch * 3, "step_in_epoch": 0, "steps": 3,
            "schedule": {"factor": 1.0, "best": None}, "loss_sum": 0.0, "loss_count": 0,
            "weights_sha": sha, "files": {"state.safetensors": sha},
        }  # fmt: skip
        if epoch in run.epochs():
            continue
        n = 10
        arrays = {
            "index": np.arange(n),
            "label": np.arange(n) % 3,
            "top5": rng.integers(0, 3, (n, 3), dtype=np.int32),
            "confidence": rng.random(n, dtype=np.float32),
            "loss": rng.random(n, dtype=np.float32),
        }
        predictions = Predictions("images", "v", arrays).to_npz()
        shas = {"weights_sha": sha, "predictions_sha": hashlib.sha256(predictions).hexdigest()}
        record = EpochRecord(epoch, epoch * 3, 1.0, 1.0, {"acc1": 50.0}, 0.1, 10.0, {"total": 1.0}, **shas).to_json()
        files = {"state.safetensors": tensors, "state.json": json.dumps(state | {"record": record}).encode()}
        steps = {"epoch": epoch, "first": epoch == 1, "count": [32] * 3, "total": [0.1] * 3}
        writer.epoch(record, files, predictions, steps)
    writer.log(0, "a line")
    writer.end("done")
    return run


@pytest.fixture(name="write_run")
def write_run_fixture() -> Callable[..., Run]:
    return write_run


@pytest.fixture
def made_run(tmp_path: Path) -> Run:
    """A finished run of three epochs."""
    return write_run(tmp_path / "remote", 3)


def wait_for(ready: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """The first true answer, or an AssertionError."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if answer := ready():
                return answer
        if time.monotonic() > until:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.1)


# ---------------------------------------------------------------------- one head on this machine


class Head:
    """A Ray head with a home, ports and a temporary folder of its own, and whoever talks to it from there."""

    def __init__(self, base: Path) -> None:
        self.home = base / "home"
        self.home.mkdir()
        # Ray puts sockets there, whose paths may have 107 characters.
        self.temporary = Path(tempfile.mkdtemp(prefix="rx", dir="/tmp"))
        self.port, self.dashboard, self.client, self.agent = (free_port() for _ in range(4))
        self.address = node_address()
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self.token = secrets.token_hex(32)
        (self.home / ".ray").mkdir()
        (self.home / ".ray" / "auth_token").write_text(self.token)
        (self.home / ".ray" / "auth_token").chmod(0o600)
        hidden = ("RAY_", "RAYEXP_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self, *more: str, cpus: int = 2, **env: str) -> None:
        self.run(
            "ray", "start", "--head", f"--port={self.port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={self.client}",
            f"--dashboard-agent-listen-port={self.agent}", f"--num-cpus={cpus}",
            "--object-store-memory=80000000", f"--temp-dir={self.temporary}", "--disable-usage-stats", *more, **env,
        )  # fmt: skip

    def run(
        self, *args: str, check: bool = True, timeout: float = 200, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            args, env=self.env | env, cwd=cwd or self.home, text=True, capture_output=True, timeout=timeout
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(args)} gave {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def rayexp(self, *args: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "rayexp", *args, "--address", self.url, **more)

    def stop(self) -> None:
        """End what was started here: every process that mentions this head's temporary folder, or has its home (Ray
        gives some of its own another title)."""
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal_number)
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not self.pids(), "Ray to end", 3)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def pids(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and int(entry.name) != os.getpid():
                    text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    if str(self.temporary).encode() in text or f"HOME={self.home}\0".encode() in text:
                        found.append(int(entry.name))
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    head = Head(tmp_path_factory.mktemp("head"))
    try:
        head.start()
        yield head
    finally:
        head.stop()


@pytest.fixture
def bare_head(tmp_path: Path) -> Iterator[Head]:
    """A head that the test itself starts."""
    head = Head(tmp_path)
    try:
        yield head
    finally:
        head.stop()


TINY = """
name: tiny
data: {name: shapes, image_size: 32, max_train_samples: 256, max_val_samples: 64}
model: {name: squeezenet1_0}
batch_size: 16
shards: 4
lr: 0.01
epochs: 2
max_failures: 3
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains in seconds."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    path.parent.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def undisturbed(tiny: Path) -> list[str]:
    """The weights after each of twelve epochs in one process of this machine."""
    args = [sys.executable, "-m", "rayexp", "train", str(tiny), "epochs=12", "--runs", str(tiny.parent / "here")]
    done = subprocess.run(args, text=True, capture_output=True, cwd=tiny.parent)
    assert done.returncode == 0, done.stderr
    return [record.weights_sha for record in Run(Path(done.stdout.strip())).records()]


@pytest.fixture(scope="session")
def wait() -> Callable[..., Any]:
    return wait_for


def node_address() -> str:
    """The address that Ray gives to this machine's node."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: the system chooses the interface
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
