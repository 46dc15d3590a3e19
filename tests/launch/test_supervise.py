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
from rayexp.errors import HeadLostError, RunError, UserError
from rayexp.launch.faults import LostError
from rayexp.launch.placement import Placement
from rayexp.launch.screen import Screen
from rayexp.runs.run import Run

Tiny = Callable[..., ExperimentConfig]
Outcome = str | BaseException


class Attempts:
    """Supervises an elastic run whose attempts come to what a test says; `made` has the workers of each.

    An attempt that is told to `grow` has been asked to make room for more workers.
    """

    def __init__(self, run: Run, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.module, self.made, self.lost = run, module, list[int](), ""
        self.text = io.StringIO()
        self._outcomes: list[Outcome] = []
        session = SimpleNamespace(nodes=lambda: [None], node_id=lambda: "node")
        for name, value in {
            "Attempt": self._attempt, "_follow": self._follow, "session": session,
            "_room_again": lambda *_: Placement(2, False, 1.0),
            "planning": SimpleNamespace(make=lambda *_: Placement(1, False, 1.0)),
            "sources": SimpleNamespace(publish=lambda run: None),
        }.items():  # fmt: skip
            monkeypatch.setattr(module, name, value)

    def _attempt(self, job: Any, plan: Placement) -> Any:
        self.made.append(plan.workers)
        outcome = self._outcomes.pop(0)
        status = outcome.replace("grow", "stopped") if isinstance(outcome, str) else ""
        error = None if isinstance(outcome, str) else outcome
        return SimpleNamespace(
            status=status, error=error, grows=outcome == "grow", start=lambda: None, close=lambda: None
        )

    def _follow(self, run: Run, config: Any, plan: Any, attempt: Any, *rest: Any) -> bool:
        if attempt.grows:
            run.stop_path.touch()
        return bool(attempt.grows)

    def __call__(self, *outcomes: Outcome, stopped: Callable[[], bool] = lambda: False) -> str:
        self._outcomes = list(outcomes)
        job: Any = SimpleNamespace(nonce="n", nodes=1, driver="d")
        watch: Any = SimpleNamespace(verdict=lambda: self.lost)
        screen = Screen(self.run, Console(file=self.text, width=300))
        return str(self.module.supervise(self.run, self.run.config(), lambda *_: job, screen, stopped, True, watch))


@pytest.fixture
def attempts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Attempts:
    from rayexp.launch.on_ray import supervise

    config = tiny(scaling={"num_workers": [1, 2]}, max_failures=1)
    return Attempts(Run.create(config, argv=[]), supervise, monkeypatch)


def test_where_there_is_room_another_attempt_has_more_workers(attempts: Attempts) -> None:
    assert attempts("grow", "done") == "done"
    assert attempts.made == [1, 2]
    assert not attempts.run.stop_path.exists()


def test_a_run_that_ends_as_it_makes_room_has_ended(attempts: Attempts) -> None:
    attempts.run.stop_path.touch()
    attempts.module._follow = lambda *_: True
    assert attempts("done") == "done"
    assert attempts.made == [1]


def test_a_signal_that_comes_as_the_run_grows_is_not_lost(attempts: Attempts) -> None:
    """It asks by the same file that asks the workers to make room."""
    assert attempts("grow", stopped=lambda: not attempts.run.stop_path.exists()) == "stopped"
    assert attempts.made == [1]


def test_lost_workers_are_replaced_as_often_as_is_asked_for(attempts: Attempts) -> None:
    assert attempts(LostError("rank 1: gone"), "done") == "done"
    assert "workers lost (rank 1: gone); attempt 2 of 2" in attempts.text.getvalue()
    with pytest.raises(RunError, match=r"^workers were lost 2 times \(max_failures: 1\); last: again; go on with: "):
        attempts(LostError("once"), LostError("again"))


def test_nodes_that_are_taken_away_with_notice_do_not_count(attempts: Attempts) -> None:
    taken = attempts.module.PreemptedError("their node was taken away")
    assert attempts(taken, taken, taken, LostError("x"), "done") == "done"
    assert len(attempts.made) == 5


@pytest.mark.parametrize("kind", [UserError, RunError])
def test_what_would_come_again_is_not_tried_again(attempts: Attempts, kind: type[UserError | RunError]) -> None:
    with pytest.raises(kind, match="wrong"):
        attempts(kind("wrong"))
    assert attempts.made == [1]


def test_after_a_request_to_stop_nobody_is_replaced(attempts: Attempts) -> None:
    with pytest.raises(KeyboardInterrupt):
        attempts(LostError("x"), stopped=lambda: True)
    assert attempts.made == [1]


def test_a_head_that_is_lost_ends_the_run_unless_it_is_done(attempts: Attempts) -> None:
    attempts.lost = "Ray's head has ended"
    assert attempts("done") == "done"
    with pytest.raises(HeadLostError, match="Ray's head has ended"):
        attempts(LostError("x"))


def test_a_ray_whose_folder_is_another_users_trains_all_the_same(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Run) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/tmp/ray/session/logs/rayexp")

    monkeypatch.setattr(attempts.module.sources, "publish", refuse)
    assert attempts("done") == "done"
    line = "warning: `rayexp collect` will not find this run: /tmp/ray/session/logs/rayexp: Permission denied"
    assert attempts.text.getvalue().splitlines() == [line]


@pytest.mark.parametrize(
    ("said", "fate"),
    [
        ("The actor died because its node has died. Node Id: 9db21c", "its node is gone"),
        (
            "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
            "Worker unexpectedly exits. Node ID: 9db21c",
            "its process is gone",
        ),
    ],
)
def test_a_worker_that_was_killed_is_told_from_a_node_that_is_gone(said: str, fate: str) -> None:
    from ray.exceptions import RayActorError

    from rayexp.launch.on_ray.attempt import _fate

    assert _fate(RayActorError(error_msg=said)) == fate
