"""Shared by several folders: no usage reports, a command, a browser, file systems that lack something."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture
def tiny_images() -> dict[str, Any]:
    """The keys of a small image classification."""
    return {
        "data": {"name": "shapes", "max_train_samples": 64, "max_val_samples": 32, "image_size": 32},
        "batch_size": 16,
        "shards": 2,
        "epochs": 2,
        "lr": 0.01,
    }


@pytest.fixture
def alone() -> Iterator[dict[str, str]]:
    """An environment in which no Ray runs that another process has started here (its address lies in RAY_TMPDIR)."""
    folder = tempfile.mkdtemp(prefix="rx-")  # short: sockets lie below it
    yield {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, "RAY_TMPDIR": folder}
    shutil.rmtree(folder, ignore_errors=True)


def members(session: int) -> list[psutil.Process]:
    """The live processes of a session, its leader last."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return sorted(found, key=lambda process: process.pid == session)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `rayexp ...` in tmp_path, in a session of its own; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "rayexp", *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for child in members(process.pid):
            child.kill()
        process.communicate()


@pytest.fixture(name="members")
def members_fixture() -> Callable[[int], list[psutil.Process]]:
    return members


@pytest.fixture(params=[80, 100])
def terminal(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """Stdout is a terminal of 80 or 100 columns; returns what was printed on it, no line of which may be broken but a
    word by itself."""
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda stream: True)  # the stream itself is another in the test
    monkeypatch.setenv("COLUMNS", str(request.param))

    def read() -> str:
        out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
        assert [line for line in out.splitlines() if len(line) > request.param and " " in line.strip()] == []
        return out

    return read


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """An environment for a process in which calls to the system fail: `faults(flock=errno.ENOSYS)`; see faults.c."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler here: nothing to preload")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    done = subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the C compiler cannot build a library: {done.stderr[-200:]}")

    def environment(**errors: int) -> dict[str, str]:
        named = {f"FAULT_{call.upper()}": str(number) for call, number in errors.items()}
        return {**os.environ, "LD_PRELOAD": str(library), **named}

    return environment


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a headless browser with these arguments; returns its DOM or whatever else it prints."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("chromium is not installed")
    profile = tmp_path_factory.mktemp("chromium")

    def run(*args: str) -> str:
        command = [found, *CHROMIUM_FLAGS, f"--user-data-dir={profile}", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return run
