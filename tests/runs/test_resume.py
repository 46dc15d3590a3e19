"""What a resume takes up: the newest whole checkpoint; what is damaged is named, and the lines are mended from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayexp.runs.integrity import examine, faults
from rayexp.runs.manifest import SEAL, STATE, broken, sealed, state_fault
from rayexp.runs.run import Run, epoch_name, step_name
from rayexp.system.disk import write_directory


@pytest.fixture
def run(interrupted: Any, tmp_path: Path) -> Run:
    return interrupted.run(tmp_path / "runs")


@pytest.fixture(scope="module")
def shared(interrupted: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """For tests that change one file and put it back."""
    return interrupted.run(tmp_path_factory.mktemp("shared"))


def test_an_untouched_run_goes_on_at_its_newest_step_and_nothing_is_said(interrupted: Any, run: Run) -> None:
    assert interrupted.resumed(run) == (26, [])
    assert [r.epoch for r in run.records()] == [1, 2]
    assert [path.name for path, _ in run.resumable()] == [step_name(26), step_name(23), epoch_name(2), epoch_name(1)]


def test_the_epochs_own_checkpoint_counts_as_later_than_its_last_step(interrupted: Any, run: Run) -> None:
    write_directory(run.checkpoints / step_name(20), interrupted.state(1, interrupted.STEPS))
    names = [path.name for path, _ in run.resumable()]
    assert names.index(epoch_name(2)) < names.index(step_name(20))
    assert broken(run.checkpoints / step_name(20)) is None


def test_the_order_of_keys_says_nothing(interrupted: Any, run: Run) -> None:
    fields = json.loads(interrupted.newest(run).read_text())
    interrupted.newest(run).write_text(json.dumps(dict(reversed(fields.items()))))
    assert interrupted.resumed(run) == (26, [])


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
def test_one_character_is_seen_and_the_one_before_is_taken(interrupted: Any, run: Run, old: str, new: str) -> None:
    text = interrupted.newest(run).read_text()
    assert old in text
    interrupted.newest(run).write_text(text.replace(old, new, 1))
    assert [str(f) for f in examine(run) if f.state == "damaged"] == [
        f"checkpoints/{step_name(26)}: {broken(interrupted.newest(run).parent)}"
    ]
    step, notes = interrupted.resumed(run)
    assert step == 23
    assert len(notes) == 1
    assert notes[0].startswith(f"{step_name(26)}: passed over, state.json is damaged")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_no_changed_byte_of_a_sealed_state_goes_unseen(interrupted: Any, shared: Run, place: int, byte: int) -> None:
    path = interrupted.newest(shared)
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
def test_an_unreadable_checkpoint_is_named_and_the_one_before_is_taken(
    interrupted: Any, run: Run, kind: str, file: str
) -> None:
    DAMAGE[kind](interrupted.newest(run).with_name(file))
    step, notes = interrupted.resumed(run)
    assert step == 23
    assert [note.split(":")[0] for note in notes] == [step_name(26)]
    assert "passed over, state" in notes[0]


def test_older_ones_are_named_too_and_none_that_is_whole_is_missed(interrupted: Any, run: Run) -> None:
    for name in (step_name(26), step_name(23), epoch_name(1)):
        (run.checkpoints / name / "state.json").write_text("{}")
    step, notes = interrupted.resumed(run)
    assert step == 20
    assert [note.split(":")[0] for note in notes] == [step_name(26), step_name(23), epoch_name(1)]


def test_where_none_is_whole_it_starts_anew_and_says_so(interrupted: Any, run: Run) -> None:
    for path, _ in list(run.resumable()):
        (path / "state.json").unlink()
    step, notes = interrupted.resumed(run)
    assert step == 0
    assert notes[-1] == "no checkpoint is whole: starting from the beginning"
    assert len(notes) == 5
    assert run.records() == []


def test_a_checkpoint_under_anothers_name_is_not_taken(interrupted: Any, run: Run) -> None:
    (run.checkpoints / step_name(26)).rename(run.checkpoints / step_name(29))
    (run.checkpoints / epoch_name(2)).rename(run.checkpoints / epoch_name(4))
    step, notes = interrupted.resumed(run)
    assert step == 23
    assert [note.split(":")[0] for note in notes] == [epoch_name(4), step_name(29)]


# ---------------------------------------------------------------------- without hashes: the first edition's


@pytest.mark.parametrize(
    ("old", "new"),
    [edit for edit in EDITS if edit[0].split('"')[1:2] and edit[0].split('"')[1] not in (
        "best", "loss_sum", "loss_count", "lr", "val_sha", "sha256"
    ) and edit != ('"factor": 1.0', '"factor": 3.0')],
)  # fmt: skip
def test_without_a_seal_what_is_missing_or_cannot_be_is_seen(
    interrupted: Any, tmp_path: Path, old: str, new: str
) -> None:
    run = interrupted.run(tmp_path / "runs", seal=False)
    text = interrupted.newest(run).read_text()
    assert old in text
    interrupted.newest(run).write_text(text.replace(old, new, 1))
    step, notes = interrupted.resumed(run)
    assert step == 23
    assert len(notes) == 1


def test_a_run_of_the_first_edition_is_not_covered_and_goes_on(interrupted: Any, tmp_path: Path) -> None:
    run = interrupted.run(tmp_path / "runs", seal=False)
    found = {finding.what: finding.state for finding in examine(run)}
    assert set(found.values()) == {"not covered", "ok"}
    assert {name for name, kind in found.items() if kind == "ok"} == {f"predictions/epoch_00{e}.npz" for e in (1, 2)}
    assert interrupted.resumed(run) == (26, [])


def test_what_a_resume_reads_is_enough_of_a_state(interrupted: Any, tmp_path: Path) -> None:
    run = interrupted.run(tmp_path / "runs", seal=False)
    fields = json.loads(interrupted.newest(run).read_text())
    interrupted.newest(run).write_text(json.dumps({key: fields[key] for key in STATE}))
    assert interrupted.resumed(run) == (26, [])


@pytest.mark.parametrize("key", ["epoch", "step", "step_in_epoch", "steps", "schedule", "loss_sum", "loss_count"])
@pytest.mark.parametrize("value", [None, "7", [], True])
def test_a_state_of_other_kinds_is_damaged(interrupted: Any, key: str, value: Any) -> None:
    fields = json.loads(interrupted.state(2, 6, seal=False)["state.json"])
    assert state_fault(fields, step_name(26)) is None
    assert key in str(state_fault({**fields, key: value}, step_name(26)))
    assert key in str(state_fault(sealed({**fields, key: value}), step_name(26)))


def test_sealed_weights_are_whole_but_nothing_to_go_on_from(interrupted: Any, run: Run) -> None:
    fields = json.loads(interrupted.newest(run).read_text())
    interrupted.newest(run).write_text(
        json.dumps(sealed({"weights_sha": fields["weights_sha"], "files": fields["files"]}))
    )
    assert broken(interrupted.newest(run).parent) is None
    assert faults(run) == []
    step, notes = interrupted.resumed(run)
    assert step == 23
    assert notes == [
        f"{step_name(26)}: passed over, state.json lacks "
        "epoch, loss_count, loss_sum, schedule, step, step_in_epoch, steps"
    ]


@pytest.mark.parametrize("change", [{"step": 25}, {"step_in_epoch": 11, "step": 31}, {"epoch": -1, "step": -4}])
def test_a_state_that_cannot_be_is_damaged(interrupted: Any, change: dict[str, int]) -> None:
    fields = json.loads(interrupted.state(2, 6, seal=False)["state.json"])
    assert "is not step" in str(state_fault({**fields, **change}, "elsewhere"))


@pytest.mark.parametrize("files", [{}, {"state.safetensors": 7}, []])
def test_a_state_without_its_files_is_damaged(interrupted: Any, files: Any) -> None:
    fields = json.loads(interrupted.state(2, 6, seal=False)["state.json"])
    assert "files" in str(state_fault({**fields, "files": files}, step_name(26)))


# ---------------------------------------------------------------------- the lines


def test_lines_come_back_from_the_checkpoints(interrupted: Any, run: Run) -> None:
    whole = run.epochs_path.read_bytes()
    first, second = interrupted.lines(run)
    for damaged in (b"", first, second, first + second[:50], b"\xff" + whole[1:], first + b"{}\n", b"[" * 10**5):
        run.epochs_path.write_bytes(damaged)
        assert interrupted.resumed(run)[0] == 26
        assert run.epochs_path.read_bytes() == whole
    run.epochs_path.unlink()
    assert interrupted.resumed(run)[0] == 26
    assert run.epochs_path.read_bytes() == whole


def test_a_changed_line_gives_way_to_the_sealed_record(interrupted: Any, run: Run) -> None:
    whole = run.epochs_path.read_bytes()
    run.epochs_path.write_bytes(whole.replace(b'"val_loss": 1.25', b'"val_loss": 0.25', 1))
    assert interrupted.resumed(run)[0] == 26
    assert run.epochs_path.read_bytes() == whole


def test_lines_that_cannot_come_back_are_named(interrupted: Any, run: Run) -> None:
    (run.checkpoint(1) / "state.json").write_text("{}")
    run.epochs_path.write_bytes(b"x\n" + interrupted.lines(run)[1])
    _, notes = interrupted.resumed(run)
    assert any("epochs.jsonl: line 1 is damaged" in note for note in notes)
    assert "epochs.jsonl: the lines of epochs [1] are lost" in notes


def test_lines_beyond_the_checkpoint_go(interrupted: Any, run: Run) -> None:
    for name in (step_name(26), step_name(23), epoch_name(2)):
        (run.checkpoints / name / "state.safetensors").unlink()
    step, notes = interrupted.resumed(run)
    assert (step, len(notes)) == (10, 3)
    assert [r.epoch for r in run.records()] == [1]
    assert [row["epoch"] for row in run.steps()] == [1]


def test_damaged_steps_are_named_and_do_not_stop_the_run(interrupted: Any, run: Run) -> None:
    whole = run.steps_path.read_bytes().splitlines(keepends=True)
    run.steps_path.write_bytes(whole[0] + b'{"count": 1}\n' + whole[1])
    step, notes = interrupted.resumed(run)
    assert step == 26
    assert notes == ["steps.jsonl: line 2 is damaged (epoch is missing)"]
    assert [row["epoch"] for row in run.steps()] == [1, 2]


def test_lines_that_are_missing_or_twice_there_are_named(interrupted: Any, run: Run) -> None:
    first, second = interrupted.lines(run)
    for there, epochs in ((second, [2]), (first + first, [1, 1]), (second + first, [2, 1])):
        run.epochs_path.write_bytes(there)
        assert f"epochs.jsonl: its epochs are {epochs}" in faults(run)


def test_what_a_killed_writer_left_goes(interrupted: Any, run: Run) -> None:
    for folder in (run.root, run.checkpoints, run.root / "predictions"):
        (folder / ".tmp-abcd-x").write_text("half")
        (folder / ".tmp-abcd-folder").mkdir()
    interrupted.resumed(run)
    assert not list(run.root.rglob(".tmp-*"))
