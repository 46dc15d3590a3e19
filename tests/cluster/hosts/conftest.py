"""Hosts made of namespaces, each with a Ray node: a cluster of several machines on one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

Wait = Callable[..., Any]
MORTAL = ("setpriv", "--pdeathsig", "KILL")  # ends with the tests, however they end
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

    def __init__(self, name: str, address: str, switch: int, wait: Wait) -> None:
        self.name, self.address, self.switch, self.wait = name, address, switch, wait
        self.process: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        script = (
            f"hostname {self.name}; mount -t tmpfs -o size=2g tmpfs /mnt; mount -t tmpfs -o size=1g tmpfs /dev/shm; "
            "mkdir -p /mnt/home/.ray /mnt/tmp; exec sleep infinity"
        )
        spaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen([*MORTAL, "unshare", *spaces, "sh", "-c", script])
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.wait(lambda: children.read_text().strip(), f"{self.name} to boot")
        self.init = int(children.read_text())
        self.wait(lambda: (self.disk / "home/.ray").is_dir(), f"{self.name}'s disk")
        port = f"v{self.name}"
        run = partial(subprocess.run, check=True)
        # One of a host that was unplugged just now may still be there.
        remove = ["nsenter", "-t", str(self.switch), "-n", "ip", "link", "delete", port]
        subprocess.run(remove, check=False, stderr=subprocess.DEVNULL)
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

    def __init__(self, wait: Wait) -> None:
        self.wait = wait
        self.net = subprocess.Popen([*MORTAL, "unshare", "--net", "sleep", "infinity"])
        self.hosts: dict[str, Host] = {}
        self.token = secrets.token_hex(32)
        self.url = f"http://{NET}.1:{DASHBOARD}"

    def __getattr__(self, name: str) -> Host:
        return self.hosts[name]

    def start(self) -> None:
        here = Path("/proc/self/ns/net").readlink()
        self.wait(lambda: Path(f"/proc/{self.net.pid}/ns/net").readlink() != here, "a network namespace")
        for words in ("link add br0 type bridge", "link set br0 up"):
            subprocess.run(["nsenter", "-t", str(self.net.pid), "-n", "ip", *words.split()], check=True)
        names = ("head", "one", "two", "desk")
        self.hosts |= {name: Host(name, f"{NET}.{i}", self.net.pid, self.wait) for i, name in enumerate(names, 1)}
        self.restart()

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

    def restart(self) -> None:
        """Every host and its Ray anew, with empty disks."""
        for host in self.hosts.values():
            host.unplug()
        for host in self.hosts.values():
            host.boot()
            self.give_token(host)
        self.join("head", 0)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.join, ("one", "two")))

    def close(self) -> None:
        for host in self.hosts.values():
            host.unplug()
        self.net.kill()
        self.net.wait()


def no_namespaces() -> str | None:
    """Why hosts cannot be made here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are made of Linux namespaces, which needs root"
    for tool in ("unshare", "nsenter", "setpriv", "ip"):
        if shutil.which(tool) is None:
            return f"hosts need the program {tool}"
    probe = "ip link add br9 type bridge && ip link add v8 type veth peer name v9 && mount -t tmpfs tmpfs /mnt"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "sh", "-c", probe], capture_output=True, text=True
    )
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


@pytest.fixture(scope="module")
def lab(wait: Wait) -> Iterator[Lab]:
    if why := no_namespaces():
        pytest.skip(why)
    lab = Lab(wait)
    try:
        lab.start()
        yield lab
    finally:
        lab.close()
