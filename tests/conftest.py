"""Shared by all tests: no usage reports, where real data lies, and file systems that lack something."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with tiny-imagenet-200-first80.zip and wikitext-2-v1.zip; skips where there is none."""
    folder = os.environ.get("RAYEXP_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("RAYEXP_TEST_DATA is unset: no real data here")
    return Path(folder)


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
