"""The run writer: its order, what it keeps, what it never removes, and what TensorBoard reads."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayexp.config import ExperimentConfig
from rayexp.engine.checkpoint import TENSORS
from rayexp.errors import WriteError
from rayexp.runs import writer as module
from rayexp.runs.run import Run, broken
from rayexp.runs.writer import KEEP_SNAPSHOTS, RunWriter
from rayexp.system import clock


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])


# ---------------------------------------------------------------------- order


def test_an_epochs_line_comes_when_all_else_is_there(epochs: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = epochs.begun(run)
    writer.snapshot(5, epochs.files(5, 0))
    order = []

    def noting(call: Callable[..., None]) -> Callable[..., None]:
        def noted(path: Path, *rest: Any) -> None:
            order.append(path.relative_to(run.root).as_posix())
            assert (run.checkpoints / "step_00000005").exists(), "a snapshot went before its epoch was whole"
            call(path, *rest)

        return noted

    for name in ("write_atomic", "write_directory", "append_line"):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    epochs.add(writer, 1)
    assert order == ["predictions/epoch_001.npz", "steps.jsonl", "checkpoints/epoch_001", "epochs.jsonl"]
    assert not list(run.checkpoints.glob("step_*"))


def test_a_fault_at_any_write_loses_nothing_and_the_next_attempt_goes_on(
    values: Any, epochs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(run: Run, at: int | None) -> int:
        writer = epochs.begun(run)
        epochs.add(writer, 1)
        writer.snapshot(15, epochs.files(15, 1))
        calls = 0

        def failing(call: Callable[..., Any]) -> Callable[..., Any]:
            def faulty(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls - 1 == at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return call(*args, **kwargs)

            return faulty

        with monkeypatch.context() as patched:
            for where, name in ((os, "fsync"), (Path, "replace"), (Path, "mkdir"), (os, "pwrite")):
                patched.setattr(where, name, failing(getattr(where, name)))
            if at is None:
                epochs.add(writer, 2)
            else:
                with pytest.raises(WriteError) as caught:
                    epochs.add(writer, 2)
                assert ".tmp-" not in str(caught.value)
                assert str(run.root) in str(caught.value)
        return calls

    def fresh() -> Run:
        return Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])

    calls = attempt(fresh(), None)
    assert calls > 15
    for at in range(calls):
        run = fresh()
        attempt(run, at)
        assert [r.epoch for r in run.records()] in ([1], [1, 2])
        for epoch in (r.epoch for r in run.records()):
            assert broken(run.checkpoint(epoch)) is None
            assert len(run.predictions(epoch)) == 3
        newest = next(path for path, _ in run.resumable() if broken(path) is None)
        assert newest.name in ("step_00000015", "epoch_002"), at
        writer = epochs.begun(run)
        done = [r.epoch for r in run.records()]
        assert done == ([1, 2] if newest.name == "epoch_002" else [1])
        assert [row["epoch"] for row in run.steps()] == done
        for epoch in range(done[-1] + 1, 4):
            epochs.add(writer, epoch)
        writer.end("done")
        assert [r.epoch for r in run.records()] == [1, 2, 3]
        assert not list(run.root.rglob(".tmp-*"))
        assert set(values(run)["loss/val"]) == {1, 2, 3}


def test_start_up_is_that_of_the_command(epochs: Any, run: Run) -> None:
    writer = epochs.begun(run)
    command = clock.mark(time.monotonic() - 30)
    writer.first_step(command, 10.0)
    startup = run.meta()["startup_seconds"]
    assert 30 <= startup["to_first_step"] < 60
    assert startup["to_worker"] == pytest.approx(startup["to_first_step"] - 10)
    epochs.begun(run).first_step(command, 5.0)  # a lost worker was replaced
    assert run.meta()["startup_seconds"] == startup
    epochs.begun(run).first_step({**command, "boot": "another host"}, 5.0)  # a resume, from there
    assert run.meta()["startup_seconds"] is None


# ---------------------------------------------------------------------- what is kept


def test_the_newest_snapshots_are_kept(epochs: Any, run: Run) -> None:
    writer = RunWriter(run)
    assert KEEP_SNAPSHOTS == 2
    for step in (8, 9, 10, 11):
        writer.snapshot(step, epochs.files(step, 0))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step_00000010", "step_00000011"]
    writer.snapshot(11, epochs.files(11, 0))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step_00000010", "step_00000011"]


def test_all_epochs_are_kept(epochs: Any, run: Run) -> None:
    writer = epochs.begun(run)
    for epoch in range(1, 12):
        epochs.add(writer, epoch)
    assert run.epochs() == [r.epoch for r in run.records()] == list(range(1, 12))
    assert [row["epoch"] for row in run.steps()] == list(range(1, 12))


def test_resume_removes_only_what_is_half(epochs: Any, run: Run) -> None:
    writer = epochs.begun(run)
    epochs.add(writer, 1)
    writer.snapshot(15, epochs.files(15, 1))
    before = {path for path in run.root.rglob("*") if path.parent != run.tb}
    for folder in (run.root, run.checkpoints, run.root / "predictions"):
        (folder / ".tmp-01234567-x").write_text("half")
    (run.checkpoints / ".tmp-01234567-step_00000016").mkdir()
    found, notes = RunWriter(run).resume()
    assert found == epochs.files(15, 1)
    assert notes == []
    assert {path for path in run.root.rglob("*") if path.parent != run.tb} == before


# ---------------------------------------------------------------------- lines


def test_a_line_is_added_and_nothing_is_written_anew(epochs: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = epochs.begun(run)
    epochs.add(writer, 1)
    for path in (run.epochs_path, run.steps_path):
        path.write_bytes(path.read_bytes().replace(b" ", b"  "))  # what would be lost by reading and writing
    inodes = [path.stat().st_ino for path in (run.epochs_path, run.steps_path)]
    before = [path.read_bytes() for path in (run.epochs_path, run.steps_path)]

    def never(*_: object) -> None:
        raise AssertionError("all epochs were read for one")

    monkeypatch.setattr(Run, "records", never)
    monkeypatch.setattr(Run, "steps", never)
    for epoch in (2, 3):
        epochs.add(writer, epoch)
    assert [path.stat().st_ino for path in (run.epochs_path, run.steps_path)] == inodes
    for path, old in zip((run.epochs_path, run.steps_path), before, strict=True):
        assert path.read_bytes().startswith(old)
        assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("mend", [True, False], ids=["resume", "append"])
def test_a_torn_line_is_passed_over_and_mended(epochs: Any, run: Run, mend: bool) -> None:
    writer = epochs.begun(run)
    for epoch in (1, 2):
        epochs.add(writer, epoch)
    for path in (run.epochs_path, run.steps_path):
        path.write_bytes(path.read_bytes()[:-20])
    assert [r.epoch for r in run.records()] == [1]
    assert [row["epoch"] for row in run.steps()] == [1]
    later = epochs.begun(run) if mend else RunWriter(run)
    if mend:
        assert [r.epoch for r in run.records()] == [1, 2]  # the checkpoint had it
    epochs.add(later, 3)
    assert [r.epoch for r in run.records()] == ([1, 2, 3] if mend else [1, 3])
    assert [row["epoch"] for row in run.steps()] == [1, 3]
    assert all(json.loads(line) for path in (run.epochs_path, run.steps_path) for line in path.open())


def test_epochs_beyond_the_checkpoint_go(values: Any, epochs: Any, run: Run) -> None:
    writer = epochs.begun(run)
    for epoch in (1, 2, 3):
        epochs.add(writer, epoch, loss=float(epoch))
    for epoch in (2, 3):
        (run.checkpoint(epoch) / TENSORS).write_bytes(b"damaged")
    later = epochs.begun(run)
    assert [r.epoch for r in run.records()] == [row["epoch"] for row in run.steps()] == [1]
    epochs.add(later, 2, loss=7.0)
    later.end("stopped")
    assert [r.val_loss for r in run.records()] == [1.0, 7.0]
    assert values(run)["loss/val"] == {1: [1.0], 2: [7.0]}
    # A writer that has not read what lies there does not double a line either.
    epochs.add(RunWriter(run), 2, loss=8.0)
    assert [r.val_loss for r in run.records()] == [1.0, 8.0]
    assert [row["epoch"] for row in run.steps()] == [1, 2]


def test_a_line_after_the_end_does_not_seem_damaged(epochs: Any, run: Run) -> None:
    writer = epochs.begun(run)
    epochs.add(writer, 1)
    RunWriter(run).end("stopped")  # a driver's, which has lost touch with the worker
    epochs.add(writer, 2)
    assert {name: run.fault(name) for name in run.files()} == {"config.yaml": None, "data.json": None}
    RunWriter(run).end("stopped")
    assert {name for name in run.files() if not run.fault(name)} >= {"epochs.jsonl", "steps.jsonl"}


def test_a_trace_is_mended_too(run: Run) -> None:
    (run.root / "trace.jsonl").write_text('{"step": 1}\n{"ste')
    RunWriter(run).trace({"step": 2})
    assert (run.root / "trace.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_log_that_cannot_be_written_hides_nothing(run: Run) -> None:
    run.logs.touch()  # a file where the folder should be
    RunWriter(run).log(0, "what went wrong")
