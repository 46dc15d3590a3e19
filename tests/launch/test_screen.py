"""The screen shows every epoch of epochs.jsonl once, while the file grows, is torn, and is mended."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rayexp.config import ExperimentConfig
from rayexp.launch.screen import Screen, epoch_line
from rayexp.runs.records import EpochRecord
from rayexp.runs.run import Run
from rayexp.system.disk import append_line, write_atomic


def record(epoch: int) -> EpochRecord:
    return EpochRecord(epoch, epoch, 1.0, 1.0, {"ppl": 2.7}, 0.1, 5.0, {"total": 1.0}, "0" * 64)


def line(epoch: int) -> str:
    return json.dumps(record(epoch).to_json())


def test_every_epoch_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    append_line(run.epochs_path, line(1))  # before this driver
    text = io.StringIO()
    screen = Screen(run, Console(file=text, width=300))
    monkeypatch.setattr(Run, "records", lambda _: pytest.fail("all epochs were read for one"))

    def shown() -> list[str]:
        screen._epochs()
        return text.getvalue().splitlines()

    assert shown() == []
    append_line(run.epochs_path, line(2))
    assert shown() == shown() == [epoch_line(record(2))]
    with run.epochs_path.open("a") as file:
        file.write(line(3)[:50])
        file.flush()
        assert len(shown()) == 1
        file.write(line(3)[50:] + "\n")
    assert shown()[1:] == [epoch_line(record(3))]
    # A resume writes a new file: first with the same epochs, then with fewer and another line.
    write_atomic(run.epochs_path, "".join(f"{line(epoch)}\n" for epoch in (1, 2, 3)))
    assert len(shown()) == 2
    write_atomic(run.epochs_path, f"{line(1)}\n")
    assert len(shown()) == 2
    append_line(run.epochs_path, line(2))
    assert shown()[2:] == [epoch_line(record(2))]


def test_what_stood_there_before_is_not_shown_when_its_end_is_torn(tmp_path: Path) -> None:
    run = Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    run.epochs_path.write_text(f"{line(1)}\n{line(2)[:30]}")
    text = io.StringIO()
    screen = Screen(run, Console(file=text, width=300))
    screen._epochs()
    append_line(run.epochs_path, line(2))
    screen._epochs()
    assert text.getvalue().splitlines() == [epoch_line(record(2))]
