"""A Ray that is started for one block."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from rayexp.errors import UserError
from rayexp.launch.on_ray import session

# As Ray 2.55.1 says it.
UNLIKE = """Version mismatch: The cluster was started with:
    Ray: {ray}
    Python: {python}
This process on node 10.0.0.7:6379 was started with:
    Ray: 2.55.1
    Python: 3.11.9
"""

SCRIPT = """
import os, signal, threading, time
import ray
from rayexp.launch.on_ray import session

@ray.remote
class Stubborn:
    def pid(self):
        # Nothing that Ray says to it ends it: SIGTERM is not heard, and the way out hangs.
        threading._register_atexit(time.sleep, 300)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        return os.getpid()

with session.session(None) as own:
    assert own
    print(ray.get(Stubborn.remote().pid.remote()))
"""


@pytest.mark.ray
def test_nothing_of_a_ray_of_our_own_is_left(alone: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=alone, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    pid = int(done.stdout)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("ray", "python", "line"),
    [
        ("2.54.0", "3.11.9", "this Ray has Ray 2.54.0, and here is Ray 2.55.1"),
        ("2.55.1", "3.12.1", "this Ray has Python 3.12.1, and here is Python 3.11.9"),
        ("2.54.0", "3.12.1", "this Ray has Ray 2.54.0 and Python 3.12.1, and here is Ray 2.55.1 and Python 3.11.9"),
    ],
)
def test_a_ray_of_another_version_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, ray: str, python: str, line: str
) -> None:
    def init(**_: object) -> None:
        raise RuntimeError(UNLIKE.format(ray=ray, python=python))

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(session, "running", lambda address: address)
    with pytest.raises(UserError) as caught, session.session("10.0.0.7:6379"):
        pass
    assert str(caught.value) == f"10.0.0.7:6379: {line}; both sides need the same versions of Ray and Python"


def test_other_errors_of_ray_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("Version mismatch: of something else")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(session, "running", lambda address: address)
    with pytest.raises(RuntimeError, match="of something else"), session.session("10.0.0.7:6379"):
        pass
