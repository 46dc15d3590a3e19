"""What hashes cover of a run, and that other bytes, other configurations and foreign checkpoints are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayexp.errors import UserError
from rayexp.runs.integrity import check_config, examine, faults
from rayexp.runs.manifest import sealed
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter


@pytest.fixture
def run(interrupted: Any, tmp_path: Path) -> Run:
    return interrupted.run(tmp_path / "runs")


def ended(run: Run, status: str = "stopped") -> Run:
    writer = RunWriter(run)
    writer.end(status)
    return run


def test_the_end_covers_everything(run: Run) -> None:
    assert run.files().keys() == {"config.yaml", "data.json"}
    ended(run)
    assert run.files().keys() == {"config.yaml", "data.json", "epochs.jsonl", "metrics.csv", "steps.jsonl"}
    assert {finding.state for finding in examine(run)} == {"ok"}
    assert [f.what for f in examine(run)] == [
        "config.yaml", "data.json", "epochs.jsonl", "steps.jsonl", "metrics.csv",
        "predictions/epoch_001.npz", "predictions/epoch_002.npz", "checkpoints/epoch_001", "checkpoints/epoch_002",
        "checkpoints/step_00000023", "checkpoints/step_00000026",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["config.yaml", "data.json", "epochs.jsonl", "steps.jsonl", "metrics.csv", "predictions/epoch_002.npz"]
)
@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes() + b" "), lambda p: p.unlink()])
def test_any_other_bytes_are_named(run: Run, name: str, damage: Callable[[Path], object]) -> None:
    damage(ended(run).root / name)
    (found,) = faults(run)
    assert found.startswith(f"{name}: ")


def test_another_configuration_is_refused_before_there_is_a_checkpoint(run: Run) -> None:
    check_config(run)
    kept = run.config_path.read_text()
    run.config_path.write_text(kept + "# a remark\n")
    with pytest.raises(UserError, match=r"config\.yaml: not what the run wrote"):
        check_config(run)
    for path, _ in list(run.resumable()):
        (path / "state.json").unlink()
    for changed in (kept.replace("lr: 1.0", "lr: 9.0"), ""):
        run.config_path.write_text(changed)
        with pytest.raises(UserError, match=r"config\.yaml: not what the run wrote"):
            check_config(run)
    run.config_path.write_text(kept)
    check_config(run)


def test_readers_refuse_what_the_run_did_not_write(run: Run) -> None:
    run.config_path.write_text(run.config_path.read_text().replace("lr: 1.0", "lr: 9.0"))
    with pytest.raises(UserError, match=r"config\.yaml: not what the run wrote"):
        run.config()
    run.data_path.write_text("{}")
    with pytest.raises(UserError, match=r"data\.json: not what the run wrote"):
        run.data()


def test_lines_of_an_ended_run_that_were_changed_are_named_at_the_next_resume(interrupted: Any, run: Run) -> None:
    ended(run)
    run.epochs_path.write_bytes(interrupted.lines(run)[0])
    step, notes = interrupted.resumed(run)
    assert step == 26
    (note,) = notes
    assert note.startswith("epochs.jsonl: not what the run wrote")
    assert [r.epoch for r in run.records()] == [1, 2]


def test_an_ended_run_that_goes_on_and_is_killed_at_any_write_is_whole(
    interrupted: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write of a resume and of the epoch after it is the last once; what then lies there has no fault."""
    ended(run)
    kept = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    data = {**interrupted.DATA, "vocabulary": ["another description of the same data"]}

    def go_on() -> None:
        run.write("config.yaml", run.config_path.read_text() + "# with other workers\n")
        run.update(status="running")
        writer = RunWriter(run)
        writer.resume()
        writer.begin({"status": "running"}, data)
        writer.epoch(interrupted.record(3), interrupted.state(3), b"", {"epoch": 3, "first": False, "total": [0.1]})
        writer.snapshot(36, interrupted.state(3, 6))
        writer.end("stopped")

    writes = []
    real = Path.replace

    class Killed(BaseException):
        pass

    def counted(path: Path, target: Path) -> Path:
        if len(writes) == allowed:
            raise Killed
        writes.append(target)
        return real(path, target)

    monkeypatch.setattr(Path, "replace", counted)
    allowed = 10**6
    go_on()
    total = len(writes)
    assert total > 12
    for allowed in range(total):
        for path in set(run.root.rglob("*")) - set(kept):
            if path.is_file():
                path.unlink()
        for path in run.checkpoints.iterdir():
            if not any(path in keep.parents for keep in kept):
                path.rmdir()
        for path, content in kept.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        writes.clear()
        with pytest.raises(Killed):
            go_on()
        assert faults(run) == [], f"killed before write {allowed}: {writes[-1] if writes else None}"
        writes.clear()
        allowed = 10**6
        step, notes = interrupted.resumed(run)
        assert (step >= 26, notes) == (True, [])
        assert faults(run) == []


def test_a_foreign_checkpoint_is_named(interrupted: Any, run: Run) -> None:
    fields = json.loads(interrupted.newest(run).read_text())
    for key, value, said in (
        ("config", {**fields["config"], "lr": 9.0}, "another configuration than config.yaml: lr 9.0 -> 1.0"),
        ("data", {"train_sha": "t" * 64, "val_sha": "x" * 64}, "of other data than data.json"),
    ):
        interrupted.newest(run).write_text(json.dumps(sealed({**fields, key: value})))
        assert [fault.split(": ", 1)[1] for fault in faults(run)] == [f"it is of {said}".replace("of of", "of")]
    interrupted.newest(run).write_text(json.dumps(fields))
    second = json.loads((run.checkpoint(2) / "state.json").read_text())
    (run.checkpoint(2) / "state.json").write_text(json.dumps(sealed({**second, "weights_sha": "0" * 64})))
    assert faults(run) == ["checkpoints/epoch_002: its weights are not those of the line in epochs.jsonl"]
