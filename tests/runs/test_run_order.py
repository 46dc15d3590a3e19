"""Numbers in the names of a run directory count as numbers, and only layouts that are known are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayexp.errors import UserError
from rayexp.runs.run import LAYOUT, Run, epoch_name, step_name


def made(root: Path, layout: int = LAYOUT) -> Run:
    (root / "run.json").write_text(json.dumps({"layout": layout, "status": "done"}))
    return Run(root)


def test_epochs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    run = made(tmp_path)
    for epoch in (1000, 2, 10, 999, 1):
        (run.checkpoints / epoch_name(epoch)).mkdir(parents=True)
    (run.checkpoints / step_name(5)).mkdir()
    (run.checkpoints / "epoch_x").mkdir()
    assert run.epochs() == [1, 2, 10, 999, 1000]
    assert run.epoch("last") == 1000


def test_checkpoints_are_resumed_from_the_most_advanced_on(tmp_path: Path) -> None:
    """Epochs have 10 steps here; after an epoch's last step both may be there, and the epoch's own comes first."""
    run = made(tmp_path)
    numbers = [("epoch", 10), ("step", 99), ("step", 25), ("epoch", 2), ("step", 20), ("epoch", 1), ("step", 9)]
    for kind, number in sorted(numbers):
        name = epoch_name(number) if kind == "epoch" else step_name(number)
        epoch, inner = (number, 0) if kind == "epoch" else divmod(number, 10)
        state = {"epoch": epoch, "step": epoch * 10 + inner, "step_in_epoch": inner, "steps": 10}
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "state.json").write_text(json.dumps(state))
    order = [path.name for path, _ in run.resumable()]
    assert order == [epoch_name(n) if kind == "epoch" else step_name(n) for kind, n in numbers]


def test_states_that_claim_epochs_without_steps_change_no_order(tmp_path: Path) -> None:
    run = made(tmp_path)
    for name, steps in ((epoch_name(1), 10), (step_name(9), 0), (step_name(8), 0)):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "state.json").write_text(json.dumps({"steps": steps}))
    assert [path.name for path, _ in run.resumable()] == [epoch_name(1), step_name(9), step_name(8)]


@pytest.mark.parametrize(
    ("text", "begun"), [('{"step": 1}', True), ('{"warnings": ["slow"]}', False), ("{", False), ("3", False)]
)
def test_an_attempt_is_stepping_when_its_progress_names_a_step(tmp_path: Path, text: str, begun: bool) -> None:
    run = made(tmp_path)
    assert not run.stepping()
    run.progress_path.write_text(text)
    assert run.stepping() is begun


def test_the_next_layout_is_not_read(tmp_path: Path) -> None:
    assert made(tmp_path).meta()["status"] == "done"
    with pytest.raises(UserError, match="newer"):
        made(tmp_path, LAYOUT + 1).meta()


def test_a_request_to_stop_lies_in_the_run_directory(tmp_path: Path) -> None:
    assert made(tmp_path).stop_path == tmp_path / "stop"
