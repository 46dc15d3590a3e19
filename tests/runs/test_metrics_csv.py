"""metrics.csv says what epochs.jsonl says, as RFC 4180 has it, whatever was interrupted."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from rayexp.config import ExperimentConfig
from rayexp.runs import metrics_csv
from rayexp.runs.records import EpochRecord
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter


def record(epoch: int, **more: object) -> dict[str, object]:
    seconds = {"total": 1.5, **({"first_step": 0.25} if epoch == 1 else {})}
    line = EpochRecord(epoch, 10 * epoch, 2.0, 1.0, {"ppl": math.e}, 0.1, 5.0, seconds, f"{epoch:064d}").to_json()
    return {**line, **more}


def add(writer: RunWriter, line: dict[str, object]) -> None:
    files = {"state.safetensors": b"", "state.json": b"{}"}
    writer.epoch(line, files, b"", {"epoch": line["epoch"], "count": [1]})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])


def rows(run: Run) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((run.root / metrics_csv.FILE).read_bytes().decode(), newline="")))


def test_it_has_a_column_for_each_value_and_a_row_for_each_epoch(run: Run) -> None:
    writer = RunWriter(run)
    for epoch in (1, 2):
        add(writer, record(epoch))
    found = rows(run)
    assert [row["epoch"] for row in found] == ["1", "2"]
    assert [float(row["ppl"]) for row in found] == [math.e, math.e]  # every digit
    assert [row["seconds.first_step"] for row in found] == ["0.25", ""]
    assert {name.partition(".")[0] for name in found[0]} == record(1).keys() - {"peak_memory"}
    text = (run.root / metrics_csv.FILE).read_bytes()
    assert text.count(b"\r\n") == text.count(b"\n") == 3
    assert text.startswith(b"epoch,step,train_loss,val_loss,ppl,lr,")


def test_what_is_not_finite_is_empty_and_names_are_quoted() -> None:
    text = metrics_csv.table([record(1, val_loss=None, **{'a, "b"': 1})])
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    assert row["val_loss"] == ""
    assert row['a, "b"'] == "1"
    assert '"a, ""b"""' in text.splitlines()[0]


def test_an_epoch_that_is_trained_again_has_one_row(run: Run) -> None:
    writer = RunWriter(run)
    for epoch in (1, 2, 3):
        add(writer, record(epoch))
    add(writer, record(2, train_loss=7.0))
    assert [(row["epoch"], row["train_loss"]) for row in rows(run)] == [("1", "2.0"), ("2", "7.0")]
    assert [line.epoch for line in run.records()] == [1, 2]
    add(RunWriter(run), record(2, train_loss=8.0))  # of another process
    assert [(row["epoch"], row["train_loss"]) for row in rows(run)] == [("1", "2.0"), ("2", "8.0")]


def test_a_resume_makes_it_anew(run: Run) -> None:
    writer = RunWriter(run)
    line = record(1)
    state = {"epoch": 1, "step": 10, "step_in_epoch": 0, "steps": 10, "schedule": {"factor": 1.0, "best": None}}
    state |= {"loss_sum": 0.0, "loss_count": 0, "record": line, "files": {"state.safetensors": EMPTY}}
    files = {"state.safetensors": b"", "state.json": json.dumps(state).encode()}
    writer.epoch(line, files, b"", {"epoch": 1, "count": [1]})
    path = run.root / metrics_csv.FILE
    whole = path.read_bytes()
    writer.end("stopped")
    for damage in (lambda: path.write_bytes(whole[:-9]), path.unlink, run.epochs_path.unlink):
        damage()
        _, notes = RunWriter(run).resume()
        assert path.read_bytes() == whole
        RunWriter(run).end("stopped")
    assert run.fault(path.name) is None
    path.write_bytes(whole[:-9])
    _, notes = RunWriter(run).resume()
    assert [note.partition(":")[0] for note in notes] == [path.name]


def test_where_no_epoch_is_left_there_is_none(run: Run) -> None:
    writer = RunWriter(run)
    add(writer, record(1))  # with a checkpoint that is damaged
    RunWriter(run).resume()
    assert run.records() == []
    assert not (run.root / metrics_csv.FILE).exists()


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
