"""glibc is told to keep freed memory; another allocator is left alone."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rayexp.engine.cpu import memory

TRAINED = """
import threading, torch
from rayexp.config import ExperimentConfig, parse
from rayexp.engine import checkpoint, runtime
from rayexp.engine.cpu import memory
from rayexp.engine.group import WorkerGroup
from rayexp.engine.trainer import Trainer
from rayexp.workloads import open_workload
IMAGES = {
    "data": {"name": "shapes", "max_train_samples": 32, "max_val_samples": 8, "image_size": 32},
    "batch_size": 16, "shards": 4,
}
WORDS = {
    "workload": "language_model",
    "data": {"name": "python_docs", "max_train_tokens": 500, "max_val_tokens": 300, "bptt": 20},
    "model": {"name": "lstm", "emsize": 16, "nhid": 16}, "batch_size": 8, "shards": 4,
}
def go():
    for tree in (IMAGES, WORDS):
        config = parse({**tree, "scaling": {"lanes": 2}}, ExperimentConfig, "test")
        with runtime.configure(config, torch.device("cpu"), config.shards) as here:
            trainer = Trainer(config, open_workload(config), WorkerGroup(), here)
            for _ in trainer.train():
                pass
            print(checkpoint.sha(trainer.state().tensors))
print(memory._glibc() is not None)
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


def jemalloc() -> str:
    from importlib.util import find_spec

    found = list(Path("/usr/lib").glob("*/libjemalloc.so.2"))
    if (ray := find_spec("ray")) and ray.origin:
        found += list((Path(ray.origin).parent / "core").glob("libjemalloc.so*"))
    if not found:
        pytest.skip("no jemalloc here")
    return str(found[0])


def of_our_own(folder: Path) -> str:
    """See allocator.c."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler here")
    library, source = folder / "allocator.so", Path(__file__).parents[2] / "allocator.c"
    done = subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-fno-builtin", "-o", library, source], check=False)
    if done.returncode:
        pytest.skip("the C compiler cannot build a library")
    return str(library)


@pytest.fixture(scope="module")
def bits() -> list[str]:
    """What training comes to with glibc's allocator."""
    told, *found = run(TRAINED).split()
    assert told == "True"
    return found


# The module by itself, without PyTorch.
TOLD = """
import runpy, sys
memory = runpy.run_path(sys.argv[1])
memory["keep_freed_memory"]()
print(memory["_glibc"]() is not None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
@pytest.mark.parametrize("allocator", ["glibc", "jemalloc", "of our own"])
def test_another_allocator_is_seen(tmp_path: Path, allocator: str) -> None:
    preloaded = {"glibc": lambda: "", "jemalloc": jemalloc, "of our own": lambda: of_our_own(tmp_path)}[allocator]()
    assert run(TOLD, memory.__file__, LD_PRELOAD=preloaded) == str(allocator == "glibc")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
@pytest.mark.parametrize("allocator", ["jemalloc", "of our own"])
def test_under_another_allocator_training_has_the_same_bits(bits: list[str], tmp_path: Path, allocator: str) -> None:
    library = jemalloc() if allocator == "jemalloc" else of_our_own(tmp_path)
    assert run(TRAINED, LD_PRELOAD=library).split() == ["False", *bits]


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


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_in_an_arena_of_its_own_a_thread_loses_them() -> None:
    """The limit that `keep_freed_memory` states; once glibc keeps them here too, that sentence can go."""
    assert int(run(FAULTS, "another", MALLOC_ARENA_MAX="8")) > 10_000
