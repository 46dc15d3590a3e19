"""Seconds between processes, by the monotonic clock."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayexp.system import clock


def test_another_process_of_this_host_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)  # set back
    before = time.monotonic()
    code = "import json, sys; from rayexp.system import clock; print(clock.since(json.loads(sys.argv[1])))"
    mark = json.dumps(clock.mark(before - 100))
    found = float(subprocess.run([sys.executable, "-c", code, mark], capture_output=True, check=True).stdout)
    assert 100 <= found <= 100 + time.monotonic() - before


def test_another_host_has_another_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = clock.mark()
    assert clock.since({**there, "boot": "another"}) is None
    assert clock.since({**there, "monotonic": there["monotonic"] + 1000}) is None
    monkeypatch.setattr(clock, "BOOT", tmp_path / "missing")
    assert clock.since(there) is None
    here = clock.since(clock.mark())
    assert here is not None
    assert here >= 0


@pytest.mark.parametrize("stat", [clock.STAT, Path("/nowhere/stat")], ids=["proc", "psutil"])
def test_when_a_process_began(monkeypatch: pytest.MonkeyPatch, stat: Path) -> None:
    before = time.monotonic()
    code = (
        "import pathlib, time; from rayexp.system import clock\n"
        f"time.sleep(0.3); clock.STAT = pathlib.Path({str(stat)!r}); print(clock.process_began())"
    )
    began = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    slack = 0.02 if stat is clock.STAT else 1.1  # psutil knows the boot to the second
    assert before - slack <= began <= time.monotonic() - 0.3 + slack
