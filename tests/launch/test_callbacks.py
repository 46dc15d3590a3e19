"""What callbacks are told of a run's files, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayexp.config import ExperimentConfig
from rayexp.launch import callbacks
from rayexp.launch.callbacks import Listeners
from rayexp.runs.records import EpochRecord
from rayexp.runs.run import Run
from rayexp.system.disk import append_line, write_atomic


class Told:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_epoch(self, record: EpochRecord) -> None:
        self.heard.append(record.epoch)

    def on_step(self, progress: dict[str, Any]) -> None:
        self.heard.append((progress["epoch"], progress["step"]))


def line(epoch: int) -> str:
    return json.dumps(EpochRecord(epoch, 10 * epoch, 2.0, 1.0, {}, 0.1, 5.0, {"total": 1.5}, f"{epoch:064d}").to_json())


def test_a_long_file_is_read_only_where_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    append_line(run.epochs_path, line(1))  # before this call
    told = Told()
    listeners = Listeners(run, [told], lambda: None)
    reads: list[Path] = []
    read = callbacks.read_lines
    monkeypatch.setattr(callbacks, "read_lines", lambda path, *rest: reads.append(path) or read(path, *rest))
    for _ in range(3):
        listeners._look()
    assert (told.heard, len(reads)) == ([], 1)
    run.progress_path.write_text(json.dumps({"epoch": 2, "step": 3, "steps": 10}))
    append_line(run.epochs_path, line(2))
    for _ in range(3):
        listeners._look()
    assert (told.heard, len(reads)) == ([(2, 3), 2], 2)
    # A lost worker's epochs are trained again, and told once.
    write_atomic(run.epochs_path, line(1) + "\n")
    listeners._look()
    for epoch in (2, 3):
        append_line(run.epochs_path, line(epoch))
    run.progress_path.write_text("{")  # as it is written
    listeners._look()
    run.progress_path.write_text(json.dumps({"warnings": []}))
    listeners._look()
    assert told.heard == [(2, 3), 2, 3]
