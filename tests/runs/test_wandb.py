"""What Weights & Biases has stored offline, read back from its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb", reason="the extra rayexp[wandb] is not installed")

from wandb.proto import wandb_internal_pb2

from rayexp.config import ExperimentConfig
from rayexp.runs.run import Run
from rayexp.runs.trackers.tracker import recall
from rayexp.runs.writer import RunWriter

pytestmark = pytest.mark.slow  # each run starts a process of its own
BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """The records of an offline file: LevelDB's log format after a header of 7 bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # padding at a block's end
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_a_run_and_its_resume_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, epochs: Any) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "own")
    monkeypatch.setattr("rayexp.runs.trackers.background.END_S", 300)
    monkeypatch.chdir(tmp_path)
    run = Run.create(ExperimentConfig(storage_path=tmp_path / "runs", tracking=("wandb",)), argv=[])
    writer = epochs.begun(run)
    assert writer.plot_steps(1, [4.0, 3.0], [0.1, None]) == []
    epochs.add(writer, 1)
    writer.end("stopped")
    with monkeypatch.context() as killed:
        killed.setattr(RunWriter, "_plot", lambda *_: None)
        epochs.add(RunWriter(run), 2, 1 / 2)  # an epoch of which it was not told
    writer = epochs.begun(run)
    writer.plot_steps(2, [3.0, 2.0], [0.1, 0.2])  # step 2 once more
    epochs.add(writer, 3, 1 / 3)
    writer.end("done")
    assert "warnings" not in run.meta()
    assert recall(run, "wandb")["run_id"] == run.id

    folder = run.root / "trackers" / "wandb" / "wandb"
    attempts = sorted(folder.glob("offline-run-*"))
    assert len(attempts) == 2
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    rows, codes = [], []
    for attempt in attempts:
        (path,) = attempt.glob("*.wandb")
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                assert (record.run.run_id, record.run.project) == (run.id, "own")
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert {"run": run.id, "optimizer.name": "sgd"}.items() <= config.items()
            elif kind == "history":
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                rows.append({name: value for name, value in values.items() if not name.startswith("_")})
            elif kind == "exit":
                codes.append(record.exit.exit_code)
        assert {path.name for path in (attempt / "files").iterdir()} >= {"rayexp_config.yaml", "rayexp_metrics.csv"}
    assert codes == [1, 0]
    assert [(row["epoch"], row["loss/val"]) for row in rows if "epoch" in row] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert [(row["step"], row.get("step/loss")) for row in rows if "step" in row] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]  # nothing in the working directory
    assert capfd.readouterr() == ("", "")
