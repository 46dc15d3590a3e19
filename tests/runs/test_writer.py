"""The run writer: its order, what it keeps, what it never removes, and what TensorBoard reads."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayexp.config import ExperimentConfig
from rayexp.engine.checkpoint import TENSORS, State, encode
from rayexp.errors import WriteError
from rayexp.runs import writer as module
from rayexp.runs.records import EpochRecord, Predictions
from rayexp.runs.run import Run, broken
from rayexp.runs.tensorboard import graph_events
from rayexp.runs.writer import KEEP_SNAPSHOTS, RunWriter
from rayexp.system import clock

PREDICTIONS = Predictions("tokens", "0" * 64, {"loss": np.zeros(3, np.float32)}).to_npz()
DATA = {"kind": "tokens", "train_sha": "a", "val_sha": "b"}


def record(epoch: int, loss: float = 1.0) -> dict[str, Any]:
    return EpochRecord(
        epoch, 10 * epoch, loss, loss, {"ppl": math.exp(loss)}, 0.1, 5.0, {"total": 1.0}, f"{epoch:064d}"
    ).to_json()


def files(step: int, epoch: int, row: dict[str, Any] | None = None) -> dict[str, bytes]:
    fields = {"step": step, "epoch": epoch, "step_in_epoch": step - 10 * epoch, "steps": 10}
    fields |= {"schedule": {"factor": 1.0, "best": None}, "loss_sum": 1.0, "loss_count": 1}
    return encode(State(fields, {"model.w": torch.full((3,), float(step))}), {"record": row} if row else {})


def steps(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "first": epoch == 1, "count": [1], "total": [0.1]}


def add(writer: RunWriter, epoch: int, loss: float = 1.0) -> None:
    row = record(epoch, loss)
    writer.epoch(row, files(10 * epoch, epoch, row), PREDICTIONS, steps(epoch))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])


def begun(run: Run) -> RunWriter:
    writer = RunWriter(run)
    writer.resume()
    writer.begin({"world_size": 0}, DATA)
    return writer


# ---------------------------------------------------------------------- order


def test_an_epochs_line_comes_when_all_else_is_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begun(run)
    writer.snapshot(5, files(5, 0))
    order = []

    def noting(call: Callable[..., None]) -> Callable[..., None]:
        def noted(path: Path, *rest: Any) -> None:
            order.append(path.relative_to(run.root).as_posix())
            assert (run.checkpoints / "step_00000005").exists(), "a snapshot went before its epoch was whole"
            call(path, *rest)

        return noted

    for name in ("write_atomic", "write_directory", "append_line"):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    add(writer, 1)
    assert order == ["predictions/epoch_001.npz", "steps.jsonl", "checkpoints/epoch_001", "epochs.jsonl"]
    assert not list(run.checkpoints.glob("step_*"))


def test_a_fault_at_any_write_loses_nothing_and_the_next_attempt_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(run: Run, at: int | None) -> int:
        writer = begun(run)
        add(writer, 1)
        writer.snapshot(15, files(15, 1))
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
                add(writer, 2)
            else:
                with pytest.raises(WriteError) as caught:
                    add(writer, 2)
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
        writer = begun(run)
        done = [r.epoch for r in run.records()]
        assert done == ([1, 2] if newest.name == "epoch_002" else [1])
        assert [row["epoch"] for row in run.steps()] == done
        for epoch in range(done[-1] + 1, 4):
            add(writer, epoch)
        writer.end("done")
        assert [r.epoch for r in run.records()] == [1, 2, 3]
        assert not list(run.root.rglob(".tmp-*"))
        assert set(values(run)["loss/val"]) == {1, 2, 3}


def test_start_up_is_that_of_the_command(run: Run) -> None:
    writer = begun(run)
    command = clock.mark(time.monotonic() - 30)
    writer.first_step(command, 10.0)
    startup = run.meta()["startup_seconds"]
    assert 30 <= startup["to_first_step"] < 60
    assert startup["to_worker"] == pytest.approx(startup["to_first_step"] - 10)
    begun(run).first_step(command, 5.0)  # a lost worker was replaced
    assert run.meta()["startup_seconds"] == startup
    begun(run).first_step({**command, "boot": "another host"}, 5.0)  # a resume, from there
    assert run.meta()["startup_seconds"] is None


# ---------------------------------------------------------------------- what is kept


def test_the_newest_snapshots_are_kept(run: Run) -> None:
    writer = RunWriter(run)
    assert KEEP_SNAPSHOTS == 2
    for step in (8, 9, 10, 11):
        writer.snapshot(step, files(step, 0))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step_00000010", "step_00000011"]
    writer.snapshot(11, files(11, 0))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step_00000010", "step_00000011"]


def test_all_epochs_are_kept(run: Run) -> None:
    writer = begun(run)
    for epoch in range(1, 12):
        add(writer, epoch)
    assert run.epochs() == [r.epoch for r in run.records()] == list(range(1, 12))
    assert [row["epoch"] for row in run.steps()] == list(range(1, 12))


def test_resume_removes_only_what_is_half(run: Run) -> None:
    writer = begun(run)
    add(writer, 1)
    writer.snapshot(15, files(15, 1))
    before = {path for path in run.root.rglob("*") if path.parent != run.tb}
    for folder in (run.root, run.checkpoints, run.root / "predictions"):
        (folder / ".tmp-01234567-x").write_text("half")
    (run.checkpoints / ".tmp-01234567-step_00000016").mkdir()
    found, notes = RunWriter(run).resume()
    assert found == files(15, 1)
    assert notes == []
    assert {path for path in run.root.rglob("*") if path.parent != run.tb} == before


# ---------------------------------------------------------------------- lines


def test_a_line_is_added_and_nothing_is_written_anew(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begun(run)
    add(writer, 1)
    for path in (run.epochs_path, run.steps_path):
        path.write_bytes(path.read_bytes().replace(b" ", b"  "))  # what would be lost by reading and writing
    inodes = [path.stat().st_ino for path in (run.epochs_path, run.steps_path)]
    before = [path.read_bytes() for path in (run.epochs_path, run.steps_path)]

    def never(*_: object) -> None:
        raise AssertionError("all epochs were read for one")

    monkeypatch.setattr(Run, "records", never)
    monkeypatch.setattr(Run, "steps", never)
    for epoch in (2, 3):
        add(writer, epoch)
    assert [path.stat().st_ino for path in (run.epochs_path, run.steps_path)] == inodes
    for path, old in zip((run.epochs_path, run.steps_path), before, strict=True):
        assert path.read_bytes().startswith(old)
        assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("mend", [True, False], ids=["resume", "append"])
def test_a_torn_line_is_passed_over_and_mended(run: Run, mend: bool) -> None:
    writer = begun(run)
    for epoch in (1, 2):
        add(writer, epoch)
    for path in (run.epochs_path, run.steps_path):
        path.write_bytes(path.read_bytes()[:-20])
    assert [r.epoch for r in run.records()] == [1]
    assert [row["epoch"] for row in run.steps()] == [1]
    later = begun(run) if mend else RunWriter(run)
    if mend:
        assert [r.epoch for r in run.records()] == [1, 2]  # the checkpoint had it
    add(later, 3)
    assert [r.epoch for r in run.records()] == ([1, 2, 3] if mend else [1, 3])
    assert [row["epoch"] for row in run.steps()] == [1, 3]
    assert all(json.loads(line) for path in (run.epochs_path, run.steps_path) for line in path.open())


def test_epochs_beyond_the_checkpoint_go(run: Run) -> None:
    writer = begun(run)
    for epoch in (1, 2, 3):
        add(writer, epoch, loss=float(epoch))
    for epoch in (2, 3):
        (run.checkpoint(epoch) / TENSORS).write_bytes(b"damaged")
    later = begun(run)
    assert [r.epoch for r in run.records()] == [row["epoch"] for row in run.steps()] == [1]
    add(later, 2, loss=7.0)
    later.end("stopped")
    assert [r.val_loss for r in run.records()] == [1.0, 7.0]
    assert values(run)["loss/val"] == {1: [1.0], 2: [7.0]}
    # A writer that has not read what lies there does not double a line either.
    add(RunWriter(run), 2, loss=8.0)
    assert [r.val_loss for r in run.records()] == [1.0, 8.0]
    assert [row["epoch"] for row in run.steps()] == [1, 2]


def test_a_line_after_the_end_does_not_seem_damaged(run: Run) -> None:
    writer = begun(run)
    add(writer, 1)
    RunWriter(run).end("stopped")  # a driver's, which has lost touch with the worker
    add(writer, 2)
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


# ---------------------------------------------------------------------- TensorBoard


def values(run: Run, folder: str = "") -> dict[str, dict[int, list[float]]]:
    """What TensorBoard shows: values by curve and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.tb / folder), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    found: dict[str, dict[int, list[float]]] = {}
    for tag in board.Tags()["scalars"]:
        for event in board.Scalars(tag):
            found.setdefault(tag, {}).setdefault(event.step, []).append(event.value)
    for tag in board.Tags()["tensors"]:
        for event in board.Tensors(tag):
            found.setdefault(tag, {}).setdefault(event.step, []).append(0.0)
    return found


def test_tensorboard_has_one_value_a_step(run: Run) -> None:
    writer = begun(run)
    for epoch in (1, 2, 3):
        add(writer, epoch, loss=float(epoch))
    writer.end("stopped")
    found = values(run)
    assert found["loss/train"] == {1: [1.0], 2: [2.0], 3: [3.0]}
    assert {"lr", "metric/ppl", "seconds/total", "throughput/samples_per_second"} <= set(found)
    for _ in range(2):  # twice from the same epoch, and in the same second
        writer = begun(run)
    add(writer, 4, loss=4.0)
    writer.end("done")
    begun(run).end("done")
    found = values(run)
    assert found["loss/train"] == {1: [1.0], 2: [2.0], 3: [3.0], 4: [4.0]}
    for tag, by_step in found.items():
        assert all(len(v) == 1 for v in by_step.values()), tag
    assert set(found["config/text_summary"]) == {0, 1, 2, 3}
    assert values(run, "hparams")["hparam/val_loss"] == {0: [4.0]}
    assert [path.name for path in (run.tb / "hparams").iterdir()] == ["events.out.tfevents.0.hparams"]


def test_the_steps_of_a_killed_attempt_are_plotted_once(run: Run) -> None:
    writer = begun(run)
    writer.plot_steps(1, [4.0, 3.0], [0.1, 0.2])
    writer.plot_steps(3, [2.0, None], [0.3, 0.4])
    writer.plot_steps(5, [9.0, 9.0], [0.9, 0.9])  # the next epoch has two steps more, and is trained again
    writer = begun(run)
    writer.plot_steps(5, [1.5], [0.5])
    writer.plot_steps(6, [], [])
    writer.end("done")
    found = values(run, "steps")
    assert found["step/loss"] == {1: [4.0], 2: [3.0], 3: [2.0], 5: [1.5]}
    assert found["step/lr"] == {step: [pytest.approx(step / 10)] for step in range(1, 6)}
    assert "step/loss" not in values(run)  # there, steps are epochs


def test_the_steps_are_flushed_once_a_call(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begun(run)
    writer.plot_steps(1, [1.0], [0.1])
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    writer.plot_steps(2, [1.0] * 500, [0.1] * 500)
    assert len(flushed) <= 1
    assert len(values(run, "steps")["step/loss"]) == 501


def test_a_point_that_a_kill_lost_comes_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begun(run)
    add(writer, 1)
    monkeypatch.setattr(RunWriter, "_plot", lambda *_: None)  # killed after the line of epoch 2
    add(writer, 2)
    monkeypatch.undo()
    (newest,) = run.tb.glob("events*")
    newest.write_bytes(newest.read_bytes()[:-7])  # and in the middle of a record
    writer = begun(run)
    add(writer, 3)
    assert set(values(run)["loss/val"]) >= {2, 3}


def test_a_clock_that_goes_back_does_not_hide_the_later_attempt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begun(run)
    for epoch in (1, 2):
        add(writer, epoch)
    (run.checkpoint(2) / TENSORS).write_bytes(b"damaged")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    writer = begun(run)
    add(writer, 2, loss=5.0)
    assert values(run)["loss/val"] == {1: [1.0], 2: [5.0]}


def test_a_full_disk_is_said_once_and_by_name(run: Run, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """TensorBoard's own writers have a thread that prints a traceback, and a queue that then blocks for ever."""
    writer = begun(run)

    def full(handle: int) -> None:
        if "/tb/" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for epoch in (1, 2, 3):
        with pytest.raises(WriteError, match=rf"^{run.tb}/events.out.tfevents\S*: cannot be written \(No space left"):
            add(writer, epoch)
    assert [r.epoch for r in run.records()] == [1, 2, 3]
    assert capfd.readouterr().err == ""


def test_a_loss_that_is_not_finite_is_plotted_without_a_word(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    writer = begun(run)
    add(writer, 1, math.nan)
    writer.end("done")
    assert run.records()[0].val_loss != run.records()[0].val_loss
    assert not caplog.records


def test_the_graph_lies_beside_curves_and_text(run: Run) -> None:
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = begun(run)
    add(writer, 1, loss=2.0)
    writer.graph(graph_events(torch.nn.Sequential(torch.nn.Linear(2, 3)), (torch.zeros(1, 2),))[0])
    writer.graph(b"")  # could not be drawn: what is there stays
    writer.end("done")
    board = EventAccumulator(str(run.tb))
    board.Reload()
    assert any("Linear" in node.name for node in board.Graph().node)
    assert [event.value for event in board.Scalars("loss/train")] == [2.0]
    assert b"batch_size" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
