"""What is told of a checkpoint's description and of a run's files, by their hashes and without."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayexp.config import ExperimentConfig
from rayexp.errors import UserError
from rayexp.runs.manifest import file_fault, sealed, state_fault
from rayexp.runs.run import Run
from rayexp.system.disk import find_directory

STATE: dict[str, Any] = {
    "epoch": 0,
    "step": 3,
    "step_in_epoch": 3,
    "steps": 26,
    "schedule": {"factor": 1.0, "best": None},
    "loss_sum": 1.5,
    "loss_count": 8,
    "files": {"state.safetensors": "0" * 64},
}


@pytest.mark.parametrize("seal", [dict, sealed], ids=["plain", "sealed"])
def test_a_state_after_any_step(seal: Any) -> None:
    assert state_fault(seal(STATE), "step_00000003") is None
    assert state_fault(seal({**STATE, "step": 0, "step_in_epoch": 0}), "elsewhere") is None
    assert state_fault(seal({**STATE, "epoch": 1, "step": 26, "step_in_epoch": 0}), "epoch_001") is None
    assert "is not step" in str(state_fault(seal({**STATE, "epoch": -1, "step": -23}), "elsewhere"))


@pytest.mark.parametrize("key", STATE)
def test_what_is_missing_in_a_state(key: str) -> None:
    """Sealed, it may hold weights only, but it must name its files."""
    left = {k: v for k, v in STATE.items() if k != key}
    assert state_fault(left, "elsewhere") == f"{key} is missing"
    assert state_fault(sealed(left), "elsewhere") == ("files is missing" if key == "files" else None)


def test_a_file_without_a_hash_is_told_by_its_keys() -> None:
    whole = json.dumps({"kind": "images", "val_sha": "0"}).encode()
    assert file_fault(whole, "data.json", {}) is None
    assert file_fault(b'{"kind": "images"}', "data.json", {}) == "no description of data: val_sha missing"
    assert file_fault(b"[", "data.json", {}) == "no description of data"
    assert file_fault(b"name: a\n", "config.yaml", {}) is not None
    assert file_fault(b"anything", "steps.jsonl", {}) is None


def test_a_run_has_died_only_where_that_can_be_known(tmp_path: Path) -> None:
    run = Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    nobody = max(psutil.pids()) + 100_000
    run.update(status="running", pid=nobody, host=socket.gethostname())
    assert run.status() == "died"
    run.update(host="elsewhere")
    assert run.status() == "running"


def test_a_directory_without_the_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no run "):
        find_directory(str(tmp_path / "other"), tmp_path / "runs", "run.json", "run")
