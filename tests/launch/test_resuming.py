"""What is said at the end of a run that can go on: the command, as it can be typed here."""

from __future__ import annotations

import errno
import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayexp.cli import _app
from rayexp.errors import RunError, Stopped, WriteError, last_words
from rayexp.launch.driver import _saved
from rayexp.launch.job import WorkerJob
from rayexp.launch.resuming import go_on, here
from rayexp.launch.worker_fault import WorkerFaultError, find
from rayexp.runs.manifest import sealed
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter

RUN = "20261124T072119Z-tiny_imagenet-6766"


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_folder_is_named_where_resume_would_not_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = f"; go on with: rayexp {command} --resume {RUN}"
    assert go_on(tmp_path / "runs" / RUN, command) == said
    assert go_on(Path("runs") / RUN, command) == said
    assert go_on(tmp_path / "my runs" / RUN, command) == f"{said} --runs 'my runs'"
    assert go_on(tmp_path.parent / "runs" / RUN, command) == f"{said} --runs {tmp_path.parent / 'runs'}"
    assert here(tmp_path / "runs") == Path("runs")


def test_what_is_said_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(go_on(tmp_path / "my runs" / RUN).partition(": ")[2])
    assert words == ["rayexp", "train", "--resume", RUN, "--runs", "my runs"]


def test_in_a_job_of_a_cluster_it_is_submitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "j1"}}))
    assert go_on(Path("/home/me/runs") / RUN) == f"; go on with: rayexp submit CONFIG --resume {RUN}"


def test_what_is_damaged_does_not_count_as_saved(tiny: Any) -> None:
    made = Run.create(tiny(), argv=[])
    assert _saved(made).startswith(f"nothing is saved yet in {made.id}; go on with: ")
    whole = {
        "epoch": 0, "step": 3, "step_in_epoch": 3, "steps": 10, "schedule": {"factor": 1.0, "best": None},
        "loss_sum": 1.0, "loss_count": 1, "files": {"state.safetensors": "0" * 64},
    }  # fmt: skip
    for step, fields in ((3, sealed(whole)), (5, {**sealed(whole), "step": 5, "step_in_epoch": 5})):
        RunWriter(made).snapshot(step, {"state.json": json.dumps(fields).encode()})
    assert _saved(made).startswith("saved up to step 3; go on with: ")


def test_a_worker_tells_the_command_as_its_driver_types_it(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's working directory is another than the driver's."""
    from rayexp.launch.on_ray import train_worker

    def full(*_: object) -> None:
        raise WriteError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full")

    monkeypatch.chdir(tmp_path)
    made = Run.create(tiny(), argv=[])
    line = go_on(made.root)
    job = WorkerJob(run=made.root, config=tiny().absolute(), device="cpu", go_on=line)
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(train_worker.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(train_worker.remote_writer, "open_writer", lambda job: RunWriter(made))
    monkeypatch.setattr(train_worker, "_train", full)
    monkeypatch.chdir(made.root)
    with pytest.raises(WorkerFaultError) as caught:
        train_worker.train_loop(job.to_json())
    found = find(str(caught.value))
    assert isinstance(found, RunError)
    assert found.advice == line != go_on(made.root)
    assert "/full: cannot be written (No space left on device)" in found.fault


def test_the_command_is_on_a_line_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"workers were lost 4 times; go on with: rayexp train --resume {RUN}"
    assert last_words("stopped; saved up to step 3") == ["stopped; saved up to step 3"]
    assert last_words(line) == ["workers were lost 4 times", f"go on with: rayexp train --resume {RUN}"]

    def fail(**_: object) -> None:
        raise RunError("workers were lost 4 times", go_on(Path("runs") / RUN))

    monkeypatch.setattr(_app, "app", fail)
    with pytest.raises(SystemExit):
        _app.main()
    said = f"error: workers were lost 4 times\ngo on with: rayexp train --resume {RUN}\n"
    assert capsys.readouterr().err == said
    assert str(Stopped(2, line)) == line
