"""The screen says where the run lies, and which data serves as which split."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rayexp.config import ExperimentConfig
from rayexp.launch.screen import Screen
from rayexp.runs.run import Run


@pytest.fixture
def followed(tmp_path: Path) -> tuple[Run, Screen, io.StringIO]:
    run = Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    out = io.StringIO()
    return run, Screen(run, Console(file=out)), out


def test_what_was_taken_of_the_data_is_said_once(followed, monkeypatch: pytest.MonkeyPatch) -> None:
    run, screen, out = followed
    monkeypatch.chdir(run.root.parent)
    screen._begun()
    assert out.getvalue() == ""  # no worker has opened the data yet
    run.update(data={"layout": "2 classes; train from train/; val from valid/"})
    for _ in range(3):
        screen._begun()
    assert out.getvalue() == f"run: {run.id}\ndata: 2 classes; train from train/; val from valid/\n"


def test_nothing_is_said_where_there_was_no_choice(followed) -> None:
    run, screen, out = followed
    run.update(data=json.loads('{"kind": "images"}'))
    screen._begun()
    assert out.getvalue() == f"run: {run.root}\n"


def test_a_cell_of_a_grid_does_not_say_where_it_lies(followed) -> None:
    run, _, out = followed
    run.update(data={})
    Screen(run, Console(file=out), named=False)._begun()
    assert out.getvalue() == ""
