"""What TensorBoard reads of a run: each point once, whatever was trained again."""

from __future__ import annotations

import errno
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig
from rayexp.engine.checkpoint import TENSORS
from rayexp.errors import WriteError
from rayexp.runs.run import Run
from rayexp.runs.tensorboard import graph_events
from rayexp.runs.writer import RunWriter


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])


def test_tensorboard_has_one_value_a_step(values: Any, epochs: Any, run: Run) -> None:
    writer = epochs.begun(run)
    for epoch in (1, 2, 3):
        epochs.add(writer, epoch, loss=float(epoch))
    writer.end("stopped")
    found = values(run)
    assert found["loss/train"] == {1: [1.0], 2: [2.0], 3: [3.0]}
    assert {"lr", "metric/ppl", "seconds/total", "throughput/samples_per_second"} <= set(found)
    for _ in range(2):  # twice from the same epoch, and in the same second
        writer = epochs.begun(run)
    epochs.add(writer, 4, loss=4.0)
    writer.end("done")
    epochs.begun(run).end("done")
    found = values(run)
    assert found["loss/train"] == {1: [1.0], 2: [2.0], 3: [3.0], 4: [4.0]}
    for tag, by_step in found.items():
        assert all(len(v) == 1 for v in by_step.values()), tag
    assert set(found["config/text_summary"]) == {0, 1, 2, 3}
    assert values(run, "hparams")["hparam/val_loss"] == {0: [4.0]}
    assert [path.name for path in (run.tb / "hparams").iterdir()] == ["events.out.tfevents.0.hparams"]


def test_the_steps_of_a_killed_attempt_are_plotted_once(values: Any, epochs: Any, run: Run) -> None:
    writer = epochs.begun(run)
    writer.plot_steps(1, [4.0, 3.0], [0.1, 0.2])
    writer.plot_steps(3, [2.0, None], [0.3, 0.4])
    writer.plot_steps(5, [9.0, 9.0], [0.9, 0.9])  # the next epoch has two steps more, and is trained again
    writer = epochs.begun(run)
    writer.plot_steps(5, [1.5], [0.5])
    writer.plot_steps(6, [], [])
    writer.end("done")
    found = values(run, "steps")
    assert found["step/loss"] == {1: [4.0], 2: [3.0], 3: [2.0], 5: [1.5]}
    assert found["step/lr"] == {step: [pytest.approx(step / 10)] for step in range(1, 6)}
    assert "step/loss" not in values(run)  # there, steps are epochs


def test_the_steps_are_flushed_once_a_call(values: Any, epochs: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = epochs.begun(run)
    writer.plot_steps(1, [1.0], [0.1])
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    writer.plot_steps(2, [1.0] * 500, [0.1] * 500)
    assert len(flushed) <= 1
    assert len(values(run, "steps")["step/loss"]) == 501


def test_a_point_that_a_kill_lost_comes_back(
    values: Any, epochs: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = epochs.begun(run)
    epochs.add(writer, 1)
    monkeypatch.setattr(RunWriter, "_plot", lambda *_: None)  # killed after the line of epoch 2
    epochs.add(writer, 2)
    monkeypatch.undo()
    (newest,) = run.tb.glob("events*")
    newest.write_bytes(newest.read_bytes()[:-7])  # and in the middle of a record
    writer = epochs.begun(run)
    epochs.add(writer, 3)
    assert set(values(run)["loss/val"]) >= {2, 3}


def test_a_clock_that_goes_back_does_not_hide_the_later_attempt(
    values: Any, epochs: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = epochs.begun(run)
    for epoch in (1, 2):
        epochs.add(writer, epoch)
    (run.checkpoint(2) / TENSORS).write_bytes(b"damaged")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    writer = epochs.begun(run)
    epochs.add(writer, 2, loss=5.0)
    assert values(run)["loss/val"] == {1: [1.0], 2: [5.0]}


def test_a_full_disk_is_said_once_and_by_name(
    epochs: Any, run: Run, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """TensorBoard's own writers have a thread that prints a traceback, and a queue that then blocks for ever."""
    writer = epochs.begun(run)

    def full(handle: int) -> None:
        if "/tb/" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for epoch in (1, 2, 3):
        with pytest.raises(WriteError, match=rf"^{run.tb}/events.out.tfevents\S*: cannot be written \(No space left"):
            epochs.add(writer, epoch)
    assert [r.epoch for r in run.records()] == [1, 2, 3]
    assert capfd.readouterr().err == ""


def test_a_loss_that_is_not_finite_is_plotted_without_a_word(
    epochs: Any, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    writer = epochs.begun(run)
    epochs.add(writer, 1, math.nan)
    writer.end("done")
    assert run.records()[0].val_loss != run.records()[0].val_loss
    assert not caplog.records


def test_the_graph_lies_beside_curves_and_text(epochs: Any, run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = epochs.begun(run)
    epochs.add(writer, 1, loss=2.0)
    writer.graph(graph_events(torch.nn.Sequential(torch.nn.Linear(2, 3)), (torch.zeros(1, 2),))[0])
    writer.graph(b"")  # could not be drawn: what is there stays
    writer.end("done")
    board = EventAccumulator(str(run.tb))
    board.Reload()
    assert any("Linear" in node.name for node in board.Graph().node)
    assert [event.value for event in board.Scalars("loss/train")] == [2.0]
    assert b"batch_size" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
