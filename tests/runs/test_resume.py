"""What a resume takes up: the newest whole checkpoint; what is damaged is named, and the lines are mended from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayexp.config import ExperimentConfig
from rayexp.errors import UserError
from rayexp.runs.integrity import check_config, examine, faults
from rayexp.runs.manifest import SEAL, STATE, broken, digest, sealed, state_fault
from rayexp.runs.records import EpochRecord
from rayexp.runs.run import Run, epoch_name, step_name
from rayexp.runs.writer import RunWriter
from rayexp.system.disk import write_directory

STEPS = 10
CONFIG = ExperimentConfig(name="made", epochs=4, lr=1.0)


def record(epoch: int) -> dict[str, Any]:
    return EpochRecord(
        epoch,
        epoch * STEPS,
        1.5,
        1.25,
        {"ppl": 3.5},
        1.0,
        9.0,
        {"total": 1.0},
        f"{epoch:064d}",
        predictions_sha=PREDICTIONS_SHA,
    ).to_json()


def state(epoch: int, inner: int = 0, seal: bool = True) -> dict[str, bytes]:
    """The files of a checkpoint as `engine.checkpoint.encode` makes them, with bytes for tensors."""
    tensors = f"tensors {epoch} {inner}".encode()
    fields: dict[str, Any] = {
        "epoch": epoch,
        "step": epoch * STEPS + inner,
        "step_in_epoch": inner,
        "steps": STEPS,
        "schedule": {"factor": 1.0, "best": None},
        "loss_sum": 12.5 if inner else 0.0,
        "loss_count": 320 if inner else 0,
        "weights_sha": f"{epoch:064d}",
        "data": {"train_sha": "t" * 64, "val_sha": "v" * 64},
        "config": CONFIG.model_dump(mode="json"),
        **({} if inner else {"record": record(epoch)}),
        "files": {"state.safetensors": digest(tensors)},
    }
    if not seal:
        del fields["config"]
    return {
        "state.safetensors": tensors,
        "state.json": json.dumps(sealed(fields) if seal else fields, indent=2).encode(),
    }


PREDICTIONS_SHA = digest(b"")
DATA = {"kind": "tokens", "vocabulary": ["a"], "train_sha": "t" * 64, "val_sha": "v" * 64}


def interrupted(storage: Path, epochs: int = 2, snapshots: tuple[int, ...] = (3, 6), seal: bool = True) -> Run:
    """A run that was killed in its third epoch, after step 6 of 10."""
    run = Run.create(CONFIG.model_copy(update={"storage_path": storage}), argv=["rayexp"])
    writer = RunWriter(run)
    run.write("data.json", json.dumps(DATA))
    for epoch in range(1, epochs + 1):
        writer.epoch(record(epoch), state(epoch, seal=seal), b"", {"epoch": epoch, "first": False, "total": [0.1]})
    for inner in snapshots:
        writer.snapshot(epochs * STEPS + inner, state(epochs, inner, seal))
    if not seal:
        run.update(files={})
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return interrupted(tmp_path / "runs")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """For tests that change one file and put it back."""
    return interrupted(tmp_path_factory.mktemp("shared"))


def resumed(run: Run) -> tuple[int, list[str]]:
    """The step that a resume goes on from, and what it says."""
    files, notes = RunWriter(run).resume()
    return (json.loads(files["state.json"])["step"] if files else 0), notes


def newest(run: Run) -> Path:
    return run.checkpoints / step_name(26) / "state.json"


def test_an_untouched_run_goes_on_at_its_newest_step_and_nothing_is_said(run: Run) -> None:
    assert resumed(run) == (26, [])
    assert [r.epoch for r in run.records()] == [1, 2]
    assert [path.name for path, _ in run.resumable()] == [step_name(26), step_name(23), epoch_name(2), epoch_name(1)]


def test_the_epochs_own_checkpoint_counts_as_later_than_its_last_step(run: Run) -> None:
    write_directory(run.checkpoints / step_name(20), state(1, STEPS))
    names = [path.name for path, _ in run.resumable()]
    assert names.index(epoch_name(2)) < names.index(step_name(20))
    assert broken(run.checkpoints / step_name(20)) is None


def test_the_order_of_keys_says_nothing(run: Run) -> None:
    fields = json.loads(newest(run).read_text())
    newest(run).write_text(json.dumps(dict(reversed(fields.items()))))
    assert resumed(run) == (26, [])


EDITS = [
    ('"step_in_epoch": 6', '"step_in_epoch": 5'),
    ('"step_in_epoch": 6', '"step_in_epocX": 6'),
    ('"epoch": 2', '"epoch": 1'),
    ('"epoch": 2', '"epocX": 2'),
    ('"step": 26', '"step": 27'),
    ('"steps": 10', '"steps": 11'),
    ('"factor": 1.0', '"factor": 3.0'),
    ('"factor"', '"facXor"'),
    ('"best": null', '"best": 0.5'),
    ('"loss_sum": 12.5', '"loss_sum": 13.5'),
    ('"loss_count": 320', '"loss_count": 321'),
    ('"lr": 1.0', '"lr": 9.0'),
    ('"val_sha": "v', '"val_sha": "w'),
    ('"files": {', '"fileX": {'),
    ("state.safetensors", "state.safetensorz"),
    ('"state.safetensors":', '"":'),
    ('"sha256": "', '"sha256": "0'),
    ("{", "["),
    ("}", ""),
]


@pytest.mark.parametrize(("old", "new"), EDITS)
def test_one_character_is_seen_and_the_one_before_is_taken(run: Run, old: str, new: str) -> None:
    text = newest(run).read_text()
    assert old in text
    newest(run).write_text(text.replace(old, new, 1))
    assert [str(f) for f in examine(run) if f.state == "damaged"] == [
        f"checkpoints/{step_name(26)}: {broken(newest(run).parent)}"
    ]
    step, notes = resumed(run)
    assert step == 23
    assert len(notes) == 1
    assert notes[0].startswith(f"{step_name(26)}: passed over, state.json is damaged")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_no_changed_byte_of_a_sealed_state_goes_unseen(shared: Run, place: int, byte: int) -> None:
    path = newest(shared)
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[place % len(whole)] = byte
    path.write_bytes(bytes(changed))
    try:
        if broken(path.parent) is None:
            # Then it says the same (another space, the seal's own name): nothing else may pass.
            before, after = json.loads(whole), json.loads(bytes(changed))
            assert {k: after[k] for k in before if k != SEAL} == {k: v for k, v in before.items() if k != SEAL}
    finally:
        path.write_bytes(whole)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "no UTF-8": lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a deep nesting": lambda path: path.write_bytes(b"[" * 100_000),
    "a list": lambda path: path.write_bytes(b"[]"),
    "an older one's": lambda path: path.write_bytes((path.parent.parent / step_name(23) / path.name).read_bytes()),
}


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_an_unreadable_checkpoint_is_named_and_the_one_before_is_taken(run: Run, kind: str, file: str) -> None:
    DAMAGE[kind](newest(run).with_name(file))
    step, notes = resumed(run)
    assert step == 23
    assert [note.split(":")[0] for note in notes] == [step_name(26)]
    assert "passed over, state" in notes[0]


def test_older_ones_are_named_too_and_none_that_is_whole_is_missed(run: Run) -> None:
    for name in (step_name(26), step_name(23), epoch_name(1)):
        (run.checkpoints / name / "state.json").write_text("{}")
    step, notes = resumed(run)
    assert step == 20
    assert [note.split(":")[0] for note in notes] == [step_name(26), step_name(23), epoch_name(1)]


def test_where_none_is_whole_it_starts_anew_and_says_so(run: Run) -> None:
    for path, _ in list(run.resumable()):
        (path / "state.json").unlink()
    step, notes = resumed(run)
    assert step == 0
    assert notes[-1] == "no checkpoint is whole: starting from the beginning"
    assert len(notes) == 5
    assert run.records() == []


def test_a_checkpoint_under_anothers_name_is_not_taken(run: Run) -> None:
    (run.checkpoints / step_name(26)).rename(run.checkpoints / step_name(29))
    (run.checkpoints / epoch_name(2)).rename(run.checkpoints / epoch_name(4))
    step, notes = resumed(run)
    assert step == 23
    assert [note.split(":")[0] for note in notes] == [epoch_name(4), step_name(29)]


# ---------------------------------------------------------------------- without hashes: the first edition's


@pytest.mark.parametrize(
    ("old", "new"),
    [edit for edit in EDITS if edit[0].split('"')[1:2] and edit[0].split('"')[1] not in (
        "best", "loss_sum", "loss_count", "lr", "val_sha", "sha256"
    ) and edit != ('"factor": 1.0', '"factor": 3.0')],
)  # fmt: skip
def test_without_a_seal_what_is_missing_or_cannot_be_is_seen(tmp_path: Path, old: str, new: str) -> None:
    run = interrupted(tmp_path / "runs", seal=False)
    text = newest(run).read_text()
    assert old in text
    newest(run).write_text(text.replace(old, new, 1))
    step, notes = resumed(run)
    assert step == 23
    assert len(notes) == 1


def test_a_run_of_the_first_edition_is_not_covered_and_goes_on(tmp_path: Path) -> None:
    run = interrupted(tmp_path / "runs", seal=False)
    found = {finding.what: finding.state for finding in examine(run)}
    assert set(found.values()) == {"not covered", "ok"}
    assert {name for name, kind in found.items() if kind == "ok"} == {f"predictions/epoch_00{e}.npz" for e in (1, 2)}
    assert resumed(run) == (26, [])


def test_what_a_resume_reads_is_enough_of_a_state(tmp_path: Path) -> None:
    run = interrupted(tmp_path / "runs", seal=False)
    fields = json.loads(newest(run).read_text())
    newest(run).write_text(json.dumps({key: fields[key] for key in STATE}))
    assert resumed(run) == (26, [])


@pytest.mark.parametrize("key", ["epoch", "step", "step_in_epoch", "steps", "schedule", "loss_sum", "loss_count"])
@pytest.mark.parametrize("value", [None, "7", [], True])
def test_a_state_of_other_kinds_is_damaged(key: str, value: Any) -> None:
    fields = json.loads(state(2, 6, seal=False)["state.json"])
    assert state_fault(fields, step_name(26)) is None
    assert key in str(state_fault({**fields, key: value}, step_name(26)))
    assert key in str(state_fault(sealed({**fields, key: value}), step_name(26)))


def test_sealed_weights_are_whole_but_nothing_to_go_on_from(run: Run) -> None:
    fields = json.loads(newest(run).read_text())
    newest(run).write_text(json.dumps(sealed({"weights_sha": fields["weights_sha"], "files": fields["files"]})))
    assert broken(newest(run).parent) is None
    assert faults(run) == []
    step, notes = resumed(run)
    assert step == 23
    assert notes == [
        f"{step_name(26)}: passed over, state.json lacks "
        "epoch, loss_count, loss_sum, schedule, step, step_in_epoch, steps"
    ]


@pytest.mark.parametrize("change", [{"step": 25}, {"step_in_epoch": 11, "step": 31}, {"epoch": -1, "step": -4}])
def test_a_state_that_cannot_be_is_damaged(change: dict[str, int]) -> None:
    fields = json.loads(state(2, 6, seal=False)["state.json"])
    assert "is not step" in str(state_fault({**fields, **change}, "elsewhere"))


@pytest.mark.parametrize("files", [{}, {"state.safetensors": 7}, []])
def test_a_state_without_its_files_is_damaged(files: Any) -> None:
    fields = json.loads(state(2, 6, seal=False)["state.json"])
    assert "files" in str(state_fault({**fields, "files": files}, step_name(26)))


# ---------------------------------------------------------------------- the lines


def lines(run: Run) -> list[bytes]:
    return run.epochs_path.read_bytes().splitlines(keepends=True)


def test_lines_come_back_from_the_checkpoints(run: Run) -> None:
    whole = run.epochs_path.read_bytes()
    first, second = lines(run)
    for damaged in (b"", first, second, first + second[:50], b"\xff" + whole[1:], first + b"{}\n", b"[" * 10**5):
        run.epochs_path.write_bytes(damaged)
        assert resumed(run)[0] == 26
        assert run.epochs_path.read_bytes() == whole
    run.epochs_path.unlink()
    assert resumed(run)[0] == 26
    assert run.epochs_path.read_bytes() == whole


def test_a_changed_line_gives_way_to_the_sealed_record(run: Run) -> None:
    whole = run.epochs_path.read_bytes()
    run.epochs_path.write_bytes(whole.replace(b'"val_loss": 1.25', b'"val_loss": 0.25', 1))
    assert resumed(run)[0] == 26
    assert run.epochs_path.read_bytes() == whole


def test_lines_that_cannot_come_back_are_named(run: Run) -> None:
    (run.checkpoint(1) / "state.json").write_text("{}")
    run.epochs_path.write_bytes(b"x\n" + lines(run)[1])
    _, notes = resumed(run)
    assert any("epochs.jsonl: line 1 is damaged" in note for note in notes)
    assert "epochs.jsonl: the lines of epochs [1] are lost" in notes


def test_lines_beyond_the_checkpoint_go(run: Run) -> None:
    for name in (step_name(26), step_name(23), epoch_name(2)):
        (run.checkpoints / name / "state.safetensors").unlink()
    step, notes = resumed(run)
    assert (step, len(notes)) == (10, 3)
    assert [r.epoch for r in run.records()] == [1]
    assert [row["epoch"] for row in run.steps()] == [1]


def test_damaged_steps_are_named_and_do_not_stop_the_run(run: Run) -> None:
    whole = run.steps_path.read_bytes().splitlines(keepends=True)
    run.steps_path.write_bytes(whole[0] + b'{"count": 1}\n' + whole[1])
    step, notes = resumed(run)
    assert step == 26
    assert notes == ["steps.jsonl: line 2 is damaged (epoch is missing)"]
    assert [row["epoch"] for row in run.steps()] == [1, 2]


def test_lines_that_are_missing_or_twice_there_are_named(run: Run) -> None:
    first, second = lines(run)
    for there, epochs in ((second, [2]), (first + first, [1, 1]), (second + first, [2, 1])):
        run.epochs_path.write_bytes(there)
        assert f"epochs.jsonl: its epochs are {epochs}" in faults(run)


def test_what_a_killed_writer_left_goes(run: Run) -> None:
    for folder in (run.root, run.checkpoints, run.root / "predictions"):
        (folder / ".tmp-abcd-x").write_text("half")
        (folder / ".tmp-abcd-folder").mkdir()
    resumed(run)
    assert not list(run.root.rglob(".tmp-*"))


# ---------------------------------------------------------------------- the manifest


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


def test_lines_of_an_ended_run_that_were_changed_are_named_at_the_next_resume(run: Run) -> None:
    ended(run)
    run.epochs_path.write_bytes(lines(run)[0])
    step, notes = resumed(run)
    assert step == 26
    (note,) = notes
    assert note.startswith("epochs.jsonl: not what the run wrote")
    assert [r.epoch for r in run.records()] == [1, 2]


def test_an_ended_run_that_goes_on_and_is_killed_at_any_write_is_whole(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write of a resume and of the epoch after it is the last once; what then lies there has no fault."""
    ended(run)
    kept = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    data = {**DATA, "vocabulary": ["another description of the same data"]}

    def go_on() -> None:
        run.write("config.yaml", run.config_path.read_text() + "# with other workers\n")
        run.update(status="running")
        writer = RunWriter(run)
        writer.resume()
        writer.begin({"status": "running"}, data)
        writer.epoch(record(3), state(3), b"", {"epoch": 3, "first": False, "total": [0.1]})
        writer.snapshot(36, state(3, 6))
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
        step, notes = resumed(run)
        assert (step >= 26, notes) == (True, [])
        assert faults(run) == []


def test_a_foreign_checkpoint_is_named(run: Run) -> None:
    fields = json.loads(newest(run).read_text())
    for key, value, said in (
        ("config", {**fields["config"], "lr": 9.0}, "another configuration than config.yaml: lr 9.0 -> 1.0"),
        ("data", {"train_sha": "t" * 64, "val_sha": "x" * 64}, "of other data than data.json"),
    ):
        newest(run).write_text(json.dumps(sealed({**fields, key: value})))
        assert [fault.split(": ", 1)[1] for fault in faults(run)] == [f"it is of {said}".replace("of of", "of")]
    newest(run).write_text(json.dumps(fields))
    second = json.loads((run.checkpoint(2) / "state.json").read_text())
    (run.checkpoint(2) / "state.json").write_text(json.dumps(sealed({**second, "weights_sha": "0" * 64})))
    assert faults(run) == ["checkpoints/epoch_002: its weights are not those of the line in epochs.jsonl"]
