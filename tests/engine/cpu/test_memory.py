"""glibc is told to keep freed memory; another allocator is left alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = """
import torch, threading
from rayexp.config import ExperimentConfig
from rayexp.engine import runtime
from rayexp.engine.cpu import memory
def go():
    with runtime.configure(ExperimentConfig(), torch.device("cpu"), 8, 1) as here:
        print(memory._glibc() is not None, here.run([lambda: float(torch.ones(1 << 20).sum())]))
thread = threading.Thread(target=go)  # as in a worker of Ray
thread.start()
thread.join()
"""


def run(code: str, *args: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def jemalloc() -> str:
    from importlib.util import find_spec

    found = list(Path("/usr/lib").glob("*/libjemalloc.so.2"))
    if (ray := find_spec("ray")) and ray.origin:
        found += list((Path(ray.origin).parent / "core").glob("libjemalloc.so*"))
    if not found or sys.platform != "linux":
        pytest.skip("no jemalloc here")
    return str(found[0])


def test_another_allocator_is_left_alone(jemalloc: str) -> None:
    assert run(SMALL, LD_PRELOAD=jemalloc) == "False [1048576.0]"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_glibc_is_told_to_keep_memory() -> None:
    assert run(SMALL) == "True [1048576.0]"


FAULTS = """
import resource, sys, threading, torch
from rayexp.engine.cpu.memory import keep_freed_memory
keep_freed_memory()
def faults():
    found = []
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(24 << 20)  # 96 MiB
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(min(found))
if sys.argv[1] == "main":
    faults()
else:
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
@pytest.mark.parametrize(("thread", "env"), [("main", {}), ("another", {"MALLOC_ARENA_MAX": "1"})])
def test_pages_of_large_blocks_are_kept(thread: str, env: dict[str, str]) -> None:
    assert int(run(FAULTS, thread, **env)) < 100  # of 24,576 pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_in_an_arena_of_its_own_a_thread_loses_them() -> None:
    """Why launch.on_ray.session sets MALLOC_ARENA_MAX; once glibc keeps them here too, that can go."""
    assert int(run(FAULTS, "another", MALLOC_ARENA_MAX="8")) > 10_000
