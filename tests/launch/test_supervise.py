"""What follows an attempt, with attempts that nobody makes: Ray is not started."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from rayexp.config import ExperimentConfig
from rayexp.launch.placement import Placement
from rayexp.launch.screen import Screen
from rayexp.runs.run import Run

Tiny = Callable[..., ExperimentConfig]


@pytest.fixture
def growing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`supervise` of an elastic run whose first attempt has made room for more workers; it notes what it attempts."""
    from rayexp.launch.on_ray import supervise as module

    config = tiny(scaling={"num_workers": [1, 2]})
    run = Run.create(config, argv=[])
    made: list[int] = []

    def attempt(job: Any, plan: Placement) -> Any:
        made.append(plan.workers)
        return SimpleNamespace(status="stopped", error=None, start=lambda: None, close=lambda: None)

    def follow(run: Run, *rest: Any) -> bool:
        run.stop_path.touch()
        return len(made) == 1

    session = SimpleNamespace(nodes=lambda: [None], node_id=lambda: "node")
    for name, value in {
        "Attempt": attempt, "_follow": follow, "_room_again": lambda *_: Placement(2, False, 1.0), "session": session,
        "planning": SimpleNamespace(make=lambda *_: Placement(1, False, 1.0)),
        "sources": SimpleNamespace(publish=lambda run: None),
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    job = SimpleNamespace(nonce="n", nodes=1, driver="d")

    text = io.StringIO()
    screen = Screen(run, Console(file=text, width=300))

    def go(stopped: Callable[[], bool]) -> str:
        watch: Any = SimpleNamespace(verdict=lambda: None)
        return module.supervise(run, config, lambda *_: job, screen, stopped, True, watch)  # type: ignore[arg-type,return-value]

    return SimpleNamespace(run=run, made=made, go=go, said=text.getvalue, module=module)


def test_where_there_is_room_another_attempt_has_more_workers(growing: Any) -> None:
    assert growing.go(lambda: False) == "stopped"
    assert growing.made == [1, 2]


def test_a_signal_that_comes_as_the_run_grows_is_not_lost(growing: Any) -> None:
    """It asks by the same file that asks the workers to make room."""
    assert growing.go(lambda: not growing.run.stop_path.exists()) == "stopped"
    assert growing.made == [1]


def test_a_ray_whose_folder_is_another_users_trains_all_the_same(growing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Run) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/tmp/ray/session/logs/rayexp")

    monkeypatch.setattr(growing.module.sources, "publish", refuse)
    assert growing.go(lambda: False) == "stopped"
    line = "warning: `rayexp collect` will not find this run: /tmp/ray/session/logs/rayexp: Permission denied"
    assert growing.said().splitlines()[0] == line
