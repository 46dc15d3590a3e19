"""The screen says which data serves as which split."""

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


def test_what_was_taken_of_the_data_is_said_once(followed) -> None:
    run, screen, out = followed
    screen._layout()
    assert out.getvalue() == ""  # no worker has opened the data yet
    run.update(data={"layout": "2 classes; train from train/; val from valid/"})
    for _ in range(3):
        screen._layout()
    assert out.getvalue() == "data: 2 classes; train from train/; val from valid/\n"


def test_nothing_is_said_where_there_was_no_choice(followed) -> None:
    run, screen, out = followed
    run.update(data=json.loads('{"kind": "images"}'))
    screen._layout()
    assert out.getvalue() == ""
