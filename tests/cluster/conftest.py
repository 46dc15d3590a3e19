"""Runs made by hand, a real Ray head behind a token, and hosts made of network namespaces."""

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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexp.config import ExperimentConfig
from rayexp.recorder import Recorder
from rayexp.records import EpochRecord, Predictions
from rayexp.runs import Run


def write_run(storage: Path, epochs: int, run: Run | None = None) -> Run:
    """A run directory as training leaves it, without training; with `run`, more epochs of that one."""
    rng = np.random.default_rng(7)
    run = run or Run.create(ExperimentConfig(name="made", storage_path=storage), argv=["rayexp", "train"])
    pen = Recorder(run)
    pen.begin({"status": "running"}, {"kind": "images", "val_sha": "v", "classes": [], "val_names": []})
    for epoch in range(1, epochs + 1):
        tensors = rng.bytes(300_000)
        sha = hashlib.sha256(tensors).hexdigest()
        record = EpochRecord(epoch, epoch * 3, 1.0, 1.0, {"acc1": 50.0}, 0.1, 10.0, {"total": 1.0}, weights_sha=sha)
        words = {"epoch": epoch, "step": epoch * 3, "weights_sha": sha, "files": {"state.safetensors": sha}}
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
        files = {"state.safetensors": tensors, "state.json": json.dumps(words | {"record": record.to_json()}).encode()}
        pen.epoch(record.to_json(), files, Predictions("images", "v", arrays).to_npz())
    pen.log(0, "a line")
    pen.end("done")
    return run


@pytest.fixture(name="write_run")
def write_run_fixture() -> Callable[..., Run]:
    return write_run


@pytest.fixture
def made_run(tmp_path: Path) -> Run:
    """A finished run of three epochs."""
    return write_run(tmp_path / "remote", 3)


# ---------------------------------------------------------------------- hosts made of namespaces

NET = "10.77.0"
PORT, DASHBOARD = 6379, 8265
# Ray's own patience is about a minute and a half; the tests shorten it. A cut link counts as a lost node after ~10 s.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "30",
}


class Host:
    """A machine of its own as far as programs can tell: network, disk (/mnt), shared memory, processes, and a name
    that nobody can resolve. Killing its first process is pulling its plug."""

    def __init__(self, name: str, address: str, switch: int) -> None:
        self.name, self.address, self.switch = name, address, switch
        self.process: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        script = (
            f"hostname {self.name}; mount -t tmpfs -o size=2g tmpfs /mnt; mount -t tmpfs -o size=1g tmpfs /dev/shm; "
            "mkdir -p /mnt/home/.ray /mnt/tmp; exec sleep infinity"
        )
        spaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(["unshare", *spaces, "sh", "-c", script])
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        wait_for(lambda: children.read_text().strip(), f"{self.name} to boot")
        self.init = int(children.read_text())
        wait_for(lambda: (self.disk / "home/.ray").is_dir(), f"{self.name}'s disk")
        port = f"v{self.name}"
        run = partial(subprocess.run, check=True)
        run(["nsenter", "-t", str(self.switch), "-n", "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0",
             "netns", str(self.init)])  # fmt: skip
        run(["nsenter", "-t", str(self.switch), "-n", "ip", "link", "set", port, "master", "br0", "up"])
        for words in ("link set lo up", f"addr add {self.address}/24 dev eth0", "link set eth0 up"):
            run(["nsenter", "-t", str(self.init), "-n", "ip", *words.split()])

    @property
    def disk(self) -> Path:
        """The host's /mnt, seen from outside."""
        return Path(f"/proc/{self.init}/root/mnt")

    def link(self, up: bool) -> None:
        """Plug the network cable in or out."""
        port = f"v{self.name}"
        subprocess.run(
            ["nsenter", "-t", str(self.switch), "-n", "ip", "link", "set", port, "up" if up else "down"], check=True
        )

    def command(self, *words: str, **env: str) -> list[str]:
        enter = ["nsenter", "-t", str(self.init), "-n", "-m", "-u", "-p", "--", "env", "-i", "-C", "/mnt"]
        fields = {
            "HOME": "/mnt/home",
            "TMPDIR": "/mnt/tmp",
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            **env,
        }
        return [*enter, *(f"{k}={v}" for k, v in fields.items()), *words]

    def run(
        self, *words: str, timeout: float = 200, check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(*words, **env), text=True, capture_output=True, timeout=timeout)
        if check and done.returncode:
            raise AssertionError(f"{self.name}: {' '.join(words)} gave {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def rayexp(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "rayexp", *words, **more)

    def pids(self, word: str) -> list[int]:
        """Processes of this host (as seen from outside) whose command line has the word."""
        space, found = Path(f"/proc/{self.init}/ns/pid").readlink(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and (entry / "ns/pid").readlink() == space:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found += [int(entry.name)] * (word in line)
        return found

    def unplug(self) -> None:
        """End the host and all of its processes."""
        if self.process is not None:
            self.process.kill()  # its only child, the host's first process, dies with it, and so do all others there
            self.process.wait()
            self.process = None


class Lab:
    """A head, two hosts with two CPUs each, and a desk without a Ray node from which jobs are sent."""

    def __init__(self) -> None:
        self.net = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        here = Path("/proc/self/ns/net").readlink()
        wait_for(lambda: Path(f"/proc/{self.net.pid}/ns/net").readlink() != here, "a network namespace")
        for words in ("link add br0 type bridge", "link set br0 up"):
            subprocess.run(["nsenter", "-t", str(self.net.pid), "-n", "ip", *words.split()], check=True)
        names = ("head", "one", "two", "desk")
        self.hosts = {name: Host(name, f"{NET}.{i}", self.net.pid) for i, name in enumerate(names, 1)}
        self.token = secrets.token_hex(32)
        self.url = f"http://{NET}.1:{DASHBOARD}"

    def __getattr__(self, name: str) -> Host:
        return self.hosts[name]

    def start(self) -> None:
        for host in self.hosts.values():
            host.boot()
            self.give_token(host)
        self.join("head", 0)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.join, ("one", "two")))

    def give_token(self, host: Host) -> None:
        path = host.disk / "home/.ray/auth_token"
        path.write_text(self.token)
        path.chmod(0o600)

    def join(self, name: str, cpus: int = 2) -> None:
        """Start a Ray node on a host."""
        head = ["--head", f"--port={PORT}", f"--dashboard-host={NET}.1", f"--dashboard-port={DASHBOARD}"]
        role = head if name == "head" else [f"--address={NET}.1:{PORT}"]
        self.hosts[name].run(
            "ray", "start", *role, f"--node-ip-address={self.hosts[name].address}", f"--num-cpus={cpus}",
            "--object-store-memory=80000000", "--temp-dir=/mnt/ray", "--disable-usage-stats", **IMPATIENT,
        )  # fmt: skip

    def reboot(self, name: str) -> None:
        """Bring a host back that was unplugged, with an empty disk."""
        self.hosts[name].boot()
        self.give_token(self.hosts[name])
        self.join(name)

    def close(self) -> None:
        for host in self.hosts.values():
            host.unplug()
        self.net.kill()
        self.net.wait()


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


def no_namespaces() -> str | None:
    """Why hosts cannot be made here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are made of Linux namespaces, which needs root"
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            return f"hosts need the program {tool}"
    probe = "ip link add br9 type bridge && ip link add v8 type veth peer name v9 && mount -t tmpfs tmpfs /mnt"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "sh", "-c", probe], capture_output=True, text=True
    )
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    if why := no_namespaces():
        pytest.skip(why)
    lab = Lab()
    try:
        lab.start()
        yield lab
    finally:
        lab.close()


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
        self, *words: str, check: bool = True, timeout: float = 200, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            words, env=self.env | env, cwd=cwd or self.home, text=True, capture_output=True, timeout=timeout
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)} gave {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def rayexp(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "rayexp", *words, "--address", self.url, **more)

    def stop(self) -> None:
        """End what was started here: every process that mentions this head's temporary folder."""
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal_number)
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not self.pids(), "Ray to end", 10)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def pids(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and int(entry.name) != os.getpid():
                    text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    if str(self.temporary).encode() in text:
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
    words = [sys.executable, "-m", "rayexp", "train", str(tiny), "epochs=12", "--runs", str(tiny.parent / "here")]
    done = subprocess.run(words, text=True, capture_output=True, cwd=tiny.parent)
    assert done.returncode == 0, done.stderr
    return [record.weights_sha for record in Run(Path(done.stdout.strip())).records()]


@pytest.fixture
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
