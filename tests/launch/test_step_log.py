"""What a run tells of each of its steps: once, whatever stopped it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rayexp.config import ExperimentConfig
from rayexp.engine.schedule import Schedule
from rayexp.launch.driver import run
from rayexp.launch.step_log import CURVES
from rayexp.runs.integrity import faults
from rayexp.runs.manifest import SEAL, sealed
from rayexp.runs.run import Run

Tiny = Callable[..., ExperimentConfig]
Command = Callable[..., "subprocess.Popen[str]"]


def only(folder: Path) -> Run:
    (found,) = Run.all(folder)
    return found


def test_records_and_steps_leave_out_the_same_steps(tiny: Tiny) -> None:
    made = run(tiny(), argv=[], max_steps=7)
    run(tiny(), argv=[], resume=made)
    rows = made.steps()
    assert [row["first"] for row in rows] == [True, False]
    for record, row in zip(made.records(), rows, strict=True):
        skip = 1 if row["first"] and len(row["count"]) > 1 else 0
        rate = sum(row["count"][skip:]) / sum(row["total"][skip:])
        assert record.samples_per_second == pytest.approx(rate, rel=1e-3)
        assert ("first_step" in record.seconds) is row["first"]


def curves(made: Run) -> list[tuple[list[float], list[float]]]:
    return [(row["loss"], row["lr"]) for row in made.steps()]


def test_every_step_has_its_loss_and_its_rate(tiny: Tiny) -> None:
    made = run(tiny(schedule={"name": "onecycle"}), argv=[])
    per_epoch = made.meta()["steps_per_epoch"]
    schedule = Schedule(made.config(), per_epoch)
    step = 0
    for record, row in zip(made.records(), made.steps(), strict=True):
        assert len(row["loss"]) == len(row["lr"]) == len(row["count"]) == per_epoch
        mean = sum(a * b for a, b in zip(row["loss"], row["count"], strict=True)) / sum(row["count"])
        assert mean == pytest.approx(record.train_loss, rel=1e-6)
        for rate in row["lr"]:
            assert rate == pytest.approx(schedule.lr(step), rel=1e-6)
            step += 1
        assert row["lr"][-1] == pytest.approx(record.lr, rel=1e-6)


def test_a_stopped_runs_steps_are_all_there_once(tiny: Tiny) -> None:
    whole = run(tiny(), argv=[])
    made = run(tiny(), argv=[], max_steps=3)
    for steps in (4, 8, None):
        run(tiny(), argv=[], resume=made, max_steps=steps)
    assert curves(made) == curves(whole)
    per_epoch = made.meta()["steps_per_epoch"]
    # Times are this process's own, as in the epochs' records.
    assert [len(row["total"]) for row in made.steps()] == [per_epoch - 8, per_epoch]
    assert shown_steps(made) == shown_steps(whole)
    assert list(shown_steps(made)) == list(range(1, 2 * per_epoch + 1))


def test_a_snapshot_of_an_older_rayexp_goes_on_without_the_steps_before(tiny: Tiny) -> None:
    whole = run(tiny(), argv=[])
    made = run(tiny(), argv=[], max_steps=3)
    (path,) = made.checkpoints.glob("step_*/state.json")
    state = json.loads(path.read_text())
    del state[CURVES]
    del state[SEAL]
    path.write_text(json.dumps(sealed(state)))
    run(tiny(), argv=[], resume=made)
    (old, later), (full, _) = curves(made), curves(whole)
    assert [values[:3] for values in old] == [[None] * 3] * 2
    assert [values[3:] for values in old] == [values[3:] for values in full]
    assert later == curves(whole)[1]
    assert list(shown_steps(made)) == list(range(4, 2 * made.meta()["steps_per_epoch"] + 1))


def shown_steps(made: Run) -> dict[int, float]:
    """The loss of each step, as TensorBoard shows it; each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(made.tb / "steps"), size_guidance={"scalars": 0})
    board.Reload()
    events = [(event.step, event.value) for event in board.Scalars("step/loss")]
    assert len(dict(events)) == len(events)
    return dict(events)


@pytest.mark.parametrize("keep", ["all", pytest.param("best", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_and_tensorboard_has_one_value_a_step(
    tiny: Tiny, tmp_path: Path, command: Command, until: Callable[..., None], keep: str
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(epochs=12, checkpoint={"keep": keep})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    process = command("train", "c.yaml")
    until(lambda: any(len(run.records()) > 2 for run in Run.all(tmp_path / "runs")))
    process.kill()
    process.wait()
    made = only(tmp_path / "runs")
    assert 2 < len(made.records()) < 12
    assert made.status() == "died"
    assert faults(made) == []
    run(config, argv=[], resume=made)
    assert made.status() == "done"
    assert faults(made) == []
    assert made.epochs() == (list(range(1, 13)) if keep == "all" else sorted({made.best(), 12}))
    assert [record.epoch for record in made.records()] == [row["epoch"] for row in made.steps()] == list(range(1, 13))
    board = EventAccumulator(str(made.tb), size_guidance={"scalars": 0})
    board.Reload()
    tags = board.Tags()
    assert {"loss/train", "loss/val", "lr", "metric/ppl", "throughput/samples_per_second"} <= set(tags["scalars"])
    assert tags["graph"]
    for tag in set(tags["scalars"]) - {"seconds/first_step"}:
        assert [event.step for event in board.Scalars(tag)] == list(range(1, 13)), tag
    per_epoch = made.meta()["steps_per_epoch"]
    assert [len(loss) for loss, _ in curves(made)] == [per_epoch] * 12
    assert list(shown_steps(made)) == list(range(1, 12 * per_epoch + 1))
    shown = {event.step: event.value for event in board.Scalars("loss/val")}
    assert shown == {r.epoch: pytest.approx(r.val_loss, rel=1e-6) for r in made.records()}
