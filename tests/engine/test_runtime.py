"""What a run pins in its process is loosed again, and its memory is nobody else's."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import runtime

CPU = torch.device("cpu")


def settings() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "benchmark": torch.backends.cudnn.benchmark,
        "tf32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.fixture(params=["as PyTorch has them", "all unlike"])
def users(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A user's own settings."""
    unlike = request.param == "all unlike"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if unlike:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = settings()
    torch.utils.deterministic.fill_uninitialized_memory = not unlike  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = unlike
    torch.set_num_threads(3 if unlike else 2)
    torch.use_deterministic_algorithms(unlike, warn_only=unlike)
    yield settings()
    torch.utils.deterministic.fill_uninitialized_memory = before["fill"]  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = before["benchmark"]
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before["tf32"]
    torch.set_num_threads(before["threads"])
    torch.use_deterministic_algorithms(before["deterministic"], warn_only=before["warns only"])


@pytest.mark.parametrize("reduction", ["exact", "ddp"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_what_was_pinned_is_loosed(users: dict[str, Any], reduction: str, lanes: int) -> None:
    config = parse({"reduction": reduction, "precision": "tf32", "scaling": {"lanes": lanes}}, ExperimentConfig, "test")
    with runtime.configure(config, CPU, 8, 1) as settled:
        during = settings()
        assert (during["deterministic"], during["warns only"], during["threads"]) == (True, False, 1)
        assert during["workspace"] == ":4096:8"
        assert not during["fill"]
        assert settled.run([torch.get_num_threads] * settled.replicas) == [1] * settled.replicas
    assert settings() == users
    if settled.pool is not None:
        with pytest.raises(RuntimeError, match="shutdown"):
            settled.run([torch.get_num_threads])


def test_an_error_looses_too(users: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="in between"), runtime.configure(ExperimentConfig(), CPU, 8):
        raise ValueError("in between")
    assert settings() == users


# ---------------------------------------------------------------------- memory

SMALL = """
import torch, threading
from rayexp.config import ExperimentConfig
from rayexp.engine import runtime
def go():
    with runtime.configure(ExperimentConfig(), torch.device("cpu"), 8, 1) as settled:
        print(runtime._glibc() is not None, settled.run([lambda: float(torch.ones(1 << 20).sum())]))
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
from rayexp.engine.runtime import keep_freed_memory
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
