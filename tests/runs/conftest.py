"""Runs as training writes them, and as it leaves them when it is killed; without training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexp.config import ExperimentConfig
from rayexp.runs.manifest import digest, sealed
from rayexp.runs.records import EpochRecord, Predictions
from rayexp.runs.run import Run, step_name
from rayexp.runs.writer import RunWriter


class Epochs:
    """Writes epochs of ten steps."""

    PREDICTIONS = Predictions("tokens", "0" * 64, {"loss": np.zeros(3, np.float32)}).to_npz()
    DATA = {"kind": "tokens", "train_sha": "a", "val_sha": "b"}  # noqa: RUF012

    def record(self, epoch: int, loss: float = 1.0) -> dict[str, Any]:
        """An epoch's line."""
        return EpochRecord(
            epoch, 10 * epoch, loss, loss, {"ppl": math.exp(loss)}, 0.1, 5.0, {"total": 1.0}, f"{epoch:064d}"
        ).to_json()

    def files(self, step: int, epoch: int, row: dict[str, Any] | None = None) -> dict[str, bytes]:
        """A checkpoint after so many steps of the run, `epoch` epochs of which are done; with an epoch's line."""
        import torch

        from rayexp.engine.checkpoint import State, encode

        fields: dict[str, Any] = {"step": step, "epoch": epoch, "step_in_epoch": step - 10 * epoch, "steps": 10}
        fields |= {"schedule": {"factor": 1.0, "best": None}, "loss_sum": 1.0, "loss_count": 1}
        more = {"weights_sha": f"{epoch:064d}"} | ({"record": row} if row else {})
        return encode(State(fields, {"model.w": torch.full((3,), float(step))}), more)

    def begun(self, run: Run) -> RunWriter:
        """The writer of an attempt that has begun."""
        writer = RunWriter(run)
        writer.resume()
        writer.begin({"world_size": 0}, self.DATA)
        return writer

    def add(self, writer: RunWriter, epoch: int, loss: float = 1.0) -> None:
        """Write an epoch."""
        row = self.record(epoch, loss)
        steps = {"epoch": epoch, "first": epoch == 1, "count": [1], "total": [0.1]}
        writer.epoch(row, self.files(10 * epoch, epoch, row), self.PREDICTIONS, steps)


@pytest.fixture(scope="session")
def epochs() -> Epochs:
    return Epochs()


class Interrupted:
    """Makes runs of ten steps an epoch that were killed, with bytes for tensors."""

    STEPS = 10
    CONFIG = ExperimentConfig(name="made", epochs=4, lr=1.0)
    DATA = {"kind": "tokens", "vocabulary": ["a"], "train_sha": "t" * 64, "val_sha": "v" * 64}  # noqa: RUF012

    def record(self, epoch: int) -> dict[str, Any]:
        """An epoch's line; its predictions are no bytes."""
        shas = {"weights_sha": f"{epoch:064d}", "predictions_sha": digest(b"")}
        return EpochRecord(
            epoch, epoch * self.STEPS, 1.5, 1.25, {"ppl": 3.5}, 1.0, 9.0, {"total": 1.0}, **shas
        ).to_json()

    def state(self, epoch: int, inner: int = 0, seal: bool = True) -> dict[str, bytes]:
        """The files of a checkpoint as `engine.checkpoint.encode` makes them; `inner` steps after the epoch."""
        tensors = f"tensors {epoch} {inner}".encode()
        fields: dict[str, Any] = {
            "epoch": epoch,
            "step": epoch * self.STEPS + inner,
            "step_in_epoch": inner,
            "steps": self.STEPS,
            "schedule": {"factor": 1.0, "best": None},
            "loss_sum": 12.5 if inner else 0.0,
            "loss_count": 320 if inner else 0,
            "weights_sha": f"{epoch:064d}",
            "data": {"train_sha": "t" * 64, "val_sha": "v" * 64},
            "config": self.CONFIG.model_dump(mode="json"),
            **({} if inner else {"record": self.record(epoch)}),
            "files": {"state.safetensors": digest(tensors)},
        }
        if not seal:
            del fields["config"]
        whole = sealed(fields) if seal else fields
        return {"state.safetensors": tensors, "state.json": json.dumps(whole, indent=2).encode()}

    def run(self, storage: Path, epochs: int = 2, snapshots: tuple[int, ...] = (3, 6), seal: bool = True) -> Run:
        """A run that was killed in its third epoch, after step 6 of 10."""
        run = Run.create(self.CONFIG.model_copy(update={"storage_path": storage}), argv=["rayexp"])
        writer = RunWriter(run)
        run.write("data.json", json.dumps(self.DATA))
        for epoch in range(1, epochs + 1):
            steps = {"epoch": epoch, "first": False, "total": [0.1]}
            writer.epoch(self.record(epoch), self.state(epoch, seal=seal), b"", steps)
        for inner in snapshots:
            writer.snapshot(epochs * self.STEPS + inner, self.state(epochs, inner, seal))
        if not seal:
            run.update(files={})
        return run

    def resumed(self, run: Run) -> tuple[int, list[str]]:
        """The step that a resume goes on from, and what it says."""
        files, notes = RunWriter(run).resume()
        return (json.loads(files["state.json"])["step"] if files else 0), notes

    def newest(self, run: Run) -> Path:
        """The state.json after step 6 of the third epoch."""
        return run.checkpoints / step_name(26) / "state.json"

    def lines(self, run: Run) -> list[bytes]:
        """Of epochs.jsonl."""
        return run.epochs_path.read_bytes().splitlines(keepends=True)


@pytest.fixture(scope="session")
def interrupted() -> Interrupted:
    return Interrupted()


@pytest.fixture(scope="session", name="values")
def values_fixture() -> Callable[..., dict[str, dict[int, list[float]]]]:
    return values


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
