"""Shared by all tests: no usage reports, no stray caches, and where real data lies."""

from __future__ import annotations

import os
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
