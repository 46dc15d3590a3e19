"""A finished run: a resume says so and changes nothing, or trains on to the bits of a run that was longer from the
start."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable

import pytest
from rich.console import Console

from rayexp.config import ExperimentConfig, components, parse
from rayexp.engine.schedule import Schedule
from rayexp.errors import UserError
from rayexp.launch import local
from rayexp.launch.driver import run
from rayexp.launch.job import WorkerJob
from rayexp.runs.integrity import examine, faults
from rayexp.runs.run import Run

Tiny = Callable[..., ExperimentConfig]
SCHEDULES = {
    "constant": {"warmup_epochs": 1.5},
    "step": {"step_epochs": 1, "gamma": 0.5},
    "plateau": {"gamma": 0.5},
    "cosine": {},
    "onecycle": {},
}


def shas(made: Run) -> list[str]:
    return [record.state_sha for record in made.records()]


def files(made: Run) -> dict[str, tuple[bytes, int]]:
    found = (path for path in made.root.rglob("*") if path.is_file())
    return {str(path.relative_to(made.root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_a_finished_run_has_nothing_to_go_on_with(
    tiny: Tiny, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    made = run(tiny(epochs=1), argv=[])
    before = files(made)
    screen = io.StringIO()
    again = run(tiny(epochs=1, max_failures=1), argv=[], resume=made, console=Console(file=screen, width=40))
    assert again.root == made.root
    assert screen.getvalue() == f"{made.id} is done, 1 of 1 epochs: nothing to go on with; epochs=2 or more trains on\n"
    assert files(made) == before
    terminal = io.StringIO()
    run(tiny(epochs=1), argv=[], resume=made, console=Console(file=terminal, width=70, force_terminal=True))
    assert " ".join(terminal.getvalue().split()) == screen.getvalue().rstrip()
    assert max(map(len, terminal.getvalue().splitlines())) <= 70
    assert "epochs=2" in terminal.getvalue()
    done = typed("train", "--resume", "tiny", "--json")
    assert (done.returncode, json.loads(done.stdout)["status"], done.stderr) == (0, "done", screen.getvalue())
    assert files(made) == before
    with pytest.raises(UserError, match=r"the configuration has changed: lr 1\.0 -> 2\.0"):
        run(tiny(epochs=1, lr=2.0), argv=[], resume=made)


@pytest.mark.parametrize(("steps", "status"), [(None, "done"), (4, "stopped")])
def test_a_resume_that_is_refused_leaves_the_run_as_it_was(tiny: Tiny, steps: int | None, status: str) -> None:
    """What was asked for and cannot be had here is not written down, so that an ordinary resume goes on."""
    made = run(tiny(epochs=1), argv=[], max_steps=steps)
    before, meta = files(made), made.meta()
    assert meta["status"] == status
    asked = made.config().scaling.model_copy(update={"use_gpu": True})
    for _ in range(2):
        with pytest.raises(UserError, match=r"use_gpu: true, but this machine .*; saved up to step \d+; go on with: "):
            run(tiny(epochs=2, scaling=asked.model_dump()), argv=["asked"], resume=made)
        for name, (data, _) in files(made).items():
            assert name in ("run.json", "driver.lock") or data == before[name][0], name
        assert made.meta() == {"resumed": [], **meta}
        assert {finding.state for finding in examine(made)} == {"ok"}
    run(tiny(epochs=2), argv=["again"], resume=made)
    assert (made.status(), made.epochs()) == ("done", [1, 2])
    assert [each["argv"] for each in made.meta()["resumed"]] == [["again"]]


@pytest.mark.parametrize(("more", "kept"), [(0, False), (1, True)])
def test_what_is_refused_after_it_has_saved_is_a_failure(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, more: int, kept: bool
) -> None:
    """Such as a step that cannot be captured: what has been trained by then belongs to the new configuration."""
    made = run(tiny(epochs=1), argv=[])
    steps = made.meta()["steps_per_epoch"]
    true = local.attempt

    def attempt(run: Run, job: WorkerJob) -> str:
        if more:
            true(run, job.model_copy(update={"max_steps": steps + more}))
        raise UserError("this cannot be done here")

    monkeypatch.setattr(local, "attempt", attempt)
    with pytest.raises(UserError, match=f"this cannot be done here; saved up to step {steps + more}; "):
        run(tiny(epochs=2), argv=[], resume=made)
    assert (made.status(), made.config().epochs) == (("failed", 2) if kept else ("done", 1))
    assert {finding.state for finding in examine(made)} == {"ok"}


def test_a_run_that_was_brought_home_without_its_checkpoints_is_finished(tiny: Tiny) -> None:
    made = run(tiny(epochs=1), argv=[])
    shutil.rmtree(made.checkpoints)
    before = files(made)
    run(tiny(epochs=1), argv=[], resume=made)
    assert files(made) == before


@pytest.mark.parametrize("damaged", ["epochs.jsonl", "checkpoints/epoch_002/state.safetensors"])
def test_a_finished_run_that_is_damaged_is_mended(tiny: Tiny, damaged: str) -> None:
    made = run(tiny(), argv=[])
    whole = shas(made)
    path = made.root / damaged
    path.write_bytes(path.read_bytes()[:-40])
    assert faults(made)
    run(tiny(), argv=[], resume=made)
    assert faults(made) == []
    assert shas(made) == whole


@pytest.mark.parametrize("schedule", ["constant", "step", "plateau"])
def test_it_trains_on_to_the_bits_of_a_longer_run(tiny: Tiny, schedule: str) -> None:
    how = {"name": schedule, **SCHEDULES[schedule]}
    whole = run(tiny(epochs=4, schedule=how), argv=[])
    made = run(tiny(epochs=2, schedule=how), argv=[])
    again = run(tiny(epochs=3, schedule=how), argv=["longer"], resume=made, max_steps=16)
    assert (again.root, again.status(), len(again.records())) == (made.root, "stopped", 2)
    assert again.config().epochs == 3
    assert {finding.state for finding in examine(made)} == {"ok"}
    with pytest.raises(UserError, match="epochs 3 -> 2: a run can be trained on, not cut short; allowed: from 3"):
        run(tiny(epochs=2, schedule=how), argv=[], resume=made)
    run(made.config(), argv=[], resume=made)  # a resume that says nothing of epochs goes on to the third
    assert (made.status(), shas(made)) == ("done", shas(whole)[:3])
    assert {finding.state for finding in examine(made)} == {"ok"}
    run(tiny(epochs=4, schedule=how), argv=["longer still"], resume=made)
    assert (made.status(), made.config().epochs, made.epochs()) == ("done", 4, [1, 2, 3, 4])
    assert shas(made) == shas(whole)
    assert {finding.state for finding in examine(made)} == {"ok"}
    assert made.meta()["resumed"][0] == {"argv": ["longer"], "after": "done"}


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_a_schedule_that_counts_on_the_end_is_said(tiny: Tiny, typed: Callable, schedule: str) -> None:
    how = {"name": schedule, **SCHEDULES[schedule]}
    made = run(tiny(epochs=1, schedule=how), argv=[])
    before = files(made)
    said = f"epochs 1 -> 2: schedule.name is {schedule}, where every learning rate depends on the number of epochs"
    with pytest.raises(UserError, match=f"--resume {made.id}: {said}"):
        run(tiny(epochs=2, schedule=how), argv=[], resume=made)
    for more in ((), ("--dry-run",)):
        done = typed("train", "--resume", "@newest", "epochs=2", *more)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert said in done.stderr
    screen = io.StringIO()
    run(tiny(epochs=1, schedule=how), argv=[], resume=made, console=Console(file=screen))
    assert "trains on" not in screen.getvalue()
    assert files(made) == before


def test_killed_as_it_begins_to_train_on_a_run_is_still_whole(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(tiny(epochs=1), argv=[])
    update = Run.update

    def killed_update(made: Run, **fields: object) -> None:
        if "status" in fields:
            raise KeyboardInterrupt
        update(made, **fields)

    def killed_write(*_: object) -> None:
        raise KeyboardInterrupt

    for method, killed in (("update", killed_update), ("write", killed_write)):
        with monkeypatch.context() as patch:
            patch.setattr(Run, method, killed)
            with pytest.raises(KeyboardInterrupt):
                run(tiny(epochs=2), argv=[], resume=made)
        assert faults(made) == []
    assert run(tiny(epochs=2), argv=[], resume=made).status() == "done"
    assert made.epochs() == [1, 2]


def test_more_epochs_excuse_no_other_change(tiny: Tiny) -> None:
    made = run(tiny(epochs=1), argv=[])
    with pytest.raises(UserError, match=r"the configuration has changed: lr 1\.0 -> 2\.0; allowed"):
        run(tiny(epochs=2, lr=2.0), argv=[], resume=made)
    with pytest.raises(UserError, match=r"changed: epochs 1 -> 2; schedule\.name constant -> cosine"):
        run(tiny(epochs=2, schedule={"name": "cosine"}), argv=[], resume=made)


def test_which_schedules_count_on_the_end() -> None:
    """`depends_on_epochs` says what the rates themselves show."""
    assert set(components.SCHEDULES) == set(SCHEDULES)
    for name in SCHEDULES:
        fields = {"lr": 1.0, "schedule": {"name": name, **SCHEDULES[name]}}
        short, long = (Schedule(parse({**fields, "epochs": epochs}, ExperimentConfig, "test"), 5) for epochs in (3, 7))
        equal = [short.lr(step) for step in range(15)] == [long.lr(step) for step in range(15)]
        assert equal is not short.config.depends_on_epochs, name
