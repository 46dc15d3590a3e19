"""`train` on two workers, `compare` and `submit` on other versions of Ray: `make ray-versions RAY="2.55.0 2.60.0"`.

Each version gets an environment of its own that sees all other packages of this one. No test of its own: it installs.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil
import requests
import yaml

ROOT = Path(__file__).parents[2]
BASE = {
    "name": "small",
    "data": {"name": "shapes", "max_train_samples": 64, "max_val_samples": 32, "image_size": 32},
    "batch_size": 16,
    "shards": 2,
    "epochs": 2,
    "lr": 0.01,
}
SCALING = [{"num_workers": 0, "use_gpu": False}, {"num_workers": 2, "use_gpu": False, "cpus_per_worker": 0.5}]
TWO = ("scaling.num_workers=2", "scaling.cpus_per_worker=0.5")


def environment(version: str, folder: Path) -> Path:
    """An environment with that Ray, and of everything else what this one has; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    # Ignoring what is seen through the path file: this environment's own Ray may be of that version.
    subprocess.run([*install, "--ignore-installed", f"ray=={version}"], check=True)
    return python


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


class Trial:
    """A home of its own with its token, and commands that run there."""

    def __init__(self, python: Path, home: Path) -> None:
        self.python, self.home = python, home
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env = kept | {
            "HOME": str(home),
            "RAY_TMPDIR": str(home / "t"),
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        (home / "t").mkdir()
        (home / "base.yaml").write_text(yaml.safe_dump(BASE))
        grid = {"name": "grid", "base": "base.yaml", "scaling": SCALING, "repeats": 1, "baseline": False}
        (home / "grid.yaml").write_text(yaml.safe_dump(grid))

    def run(self, *words: str, **env: str) -> str:
        done = subprocess.run(
            [str(self.python), "-m", *words], cwd=self.home, env=self.env | env, text=True, capture_output=True
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def train(self) -> set[str]:
        """Two workers on a Ray of their own; the weights that came out."""
        self.run("rayexp", "train", "base.yaml", "storage_path=alone", "scaling.num_workers=0")
        self.run("rayexp", "train", "base.yaml", "storage_path=two", *TWO)
        return {self.weights("alone"), self.weights("two")}

    def weights(self, storage: str) -> str:
        (path,) = self.home.glob(f"{storage}/*/epochs.jsonl")
        return str(json.loads(path.read_text().splitlines()[-1])["weights_sha"])

    def compare(self) -> bool:
        found = json.loads(self.run("rayexp", "compare", "grid.yaml", "--json"))
        assert {cell["cell"] for cell in found["cells"]} == {"cpu-inprocess-exact", "cpu-x2-exact"}, found
        return bool(found["equal_weights"])

    def submit(self) -> str:
        """A job on a head of its own; the weights that came out."""
        port, board, client, agent, listen = free_ports(5)
        (self.home / ".ray").mkdir(exist_ok=True)
        token = self.home / ".ray" / "auth_token"
        if not token.exists():
            token.write_text(secrets.token_hex(32))
        start = [str(self.python.parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
        start += [f"--dashboard-port={board}", f"--ray-client-server-port={client}", "--disable-usage-stats"]
        start += [f"--dashboard-agent-grpc-port={agent}", f"--dashboard-agent-listen-port={listen}"]
        start += [f"--temp-dir={self.home / 'h'}", "--dashboard-host=127.0.0.1", "--object-store-memory=80000000"]
        env = self.env | {"RAY_AUTH_MODE": "token"}
        url = f"http://127.0.0.1:{board}"
        with (self.home / "head.log").open("w") as log:
            head = subprocess.Popen(start, env=env, stdout=log, stderr=log, cwd=self.home)
        try:
            until = time.monotonic() + 90
            while not _answers(f"{url}/api/jobs/", token.read_text()):
                waiting = head.poll() is None and time.monotonic() < until
                assert waiting, (self.home / "head.log").read_text()
                time.sleep(0.5)
            words = ("base.yaml", f"storage_path={self.home / 'job'}", *TWO)
            self.run("rayexp", "submit", *words, "--address", url, "--wait")
        finally:
            below = psutil.Process(head.pid).children(recursive=True)
            head.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(below, timeout=15)
            for process in alive:
                process.kill()
            head.kill()
            head.wait()
        return self.weights("job")


def _answers(url: str, token: str) -> bool:
    try:
        answer = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=2)
    except requests.RequestException:
        return False
    return answer.status_code == 200


def main(versions: list[str]) -> None:
    for version in versions:
        with tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            python = environment(version, Path(folder, "env"))
            home = Path(folder, "home")
            home.mkdir()
            trial = Trial(python, home)
            found = trial.run("ray.scripts.scripts", "--version").split()[-1]
            assert found == version, found
            for name in ("train", "compare", "submit"):
                began = time.monotonic()
                result = getattr(trial, name)()
                if name == "train":
                    assert len(result) == 1, f"{version}: two workers have other weights"
                    weights = result
                elif name == "compare":
                    assert result is True, f"{version}: the cells' weights differ"
                else:
                    assert {result} == weights, f"{version}: the job has other weights"
                print(f"ray {version}: {name}: done in {time.monotonic() - began:.0f} s", flush=True)
            shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
