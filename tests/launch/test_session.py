"""A Ray that is started for one block."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

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
