"""Trackers: which are opened, what they are told, and that none of them ends or slows a run.

What MLflow and Weights & Biases have stored is read back in test_mlflow.py and test_wandb.py.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayexp.config import ExperimentConfig, parse, read
from rayexp.errors import UserError
from rayexp.runs.integrity import check_unchanged
from rayexp.runs.records import EpochRecord
from rayexp.runs.run import Run
from rayexp.runs.trackers import background, opening
from rayexp.runs.trackers.background import BackgroundTracker
from rayexp.runs.trackers.opening import hand_on, opened, refuse_missing, told
from rayexp.runs.trackers.tracker import environment, parameters, points, recall, remember, scalars
from rayexp.runs.writer import RunWriter

RECORD = EpochRecord(1, 10, 2.0, 1.0, {"ppl": 2.5}, 0.1, 5.0, {"total": 1.5}, "a" * 64)
Make = Callable[[Run], Any]


class Fake:
    """A service that notes what it is told, and does what `calls` says instead where it says something."""

    def __init__(self, **instead: Callable[[], None]) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.instead = instead

    def __call__(self, run: Run) -> Fake:
        return self

    def _hear(self, *call: Any) -> None:
        self.instead.get(call[0], lambda: None)()
        self.heard.append(call)

    def begin(self) -> None:
        self._hear("begin")

    def log(self, rows: Sequence[tuple[int, Mapping[str, float]]], axis: str) -> None:
        self._hear(axis, list(rows))

    def end(self, status: str) -> None:
        self._hear("end", status)


def unreachable() -> None:
    raise ConnectionError("nobody\nanswers")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """With one epoch's line."""
    made = Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    made.epochs_path.write_text(json.dumps(RECORD.to_json()) + "\n")
    return made


def tell_all(tracker: BackgroundTracker) -> list[str]:
    tracker.begin()
    tracker.steps(1, [2.0, None], [0.1, 0.2])
    tracker.epoch(RECORD)
    tracker.end("done")
    return tracker.take_warnings()


# ---------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("tracking=[]", ()),
        ("tracking=mlflow", ("mlflow",)),
        ("tracking=[tensorboard, wandb]", ("tensorboard", "wandb")),
        ("tracking=[wandb,wandb]", ("wandb",)),
    ],
)
def test_a_list_or_one_name(tmp_path: Path, said: str, meant: tuple[str, ...]) -> None:
    (tmp_path / "x.yaml").write_text("{}")
    assert ExperimentConfig().tracking == ("tensorboard",)
    config = read(tmp_path / "x.yaml", [said])
    assert config.tracking == meant
    (tmp_path / "x.yaml").write_text(config.to_yaml())
    assert read(tmp_path / "x.yaml") == config


@pytest.mark.parametrize("value", ["tensorbord", ["mlflow", "aim"], None, 3, {"mlflow": 1}])
def test_another_name_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"^test: tracking"):
        parse({"tracking": value}, ExperimentConfig, "test")


def test_a_library_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    refuse_missing(["tensorboard", "mlflow"])
    with pytest.raises(UserError, match=r"^tracking: wandb is not installed; pip install 'rayexp\[wandb\]', or leave"):
        refuse_missing(["mlflow", "wandb"])


def test_a_run_whose_tracker_is_missing_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayexp.launch.driver import outline
    from rayexp.launch.driver import run as train

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = ExperimentConfig(storage_path=tmp_path / "runs", tracking=("mlflow",))
    for start in (lambda: train(config, argv=[]), lambda: outline(config)):
        with pytest.raises(UserError, match="mlflow is not installed"):
            start()
    assert not (tmp_path / "runs").exists()


def test_a_resume_may_be_tracked_elsewhere(run: Run) -> None:
    check_unchanged(run, run.config().model_copy(update={"tracking": ()}))


def test_nobody_is_told_where_nobody_is_named(tmp_path: Path) -> None:
    run = Run.create(ExperimentConfig(storage_path=tmp_path, tracking=()), argv=[])
    writer = RunWriter(run)
    writer.begin({}, {"kind": "tokens", "val_sha": "x"})
    assert writer.plot_steps(1, [1.0], [0.1]) == []
    writer.end("done")
    assert opened(run) == []
    assert not run.tb.exists()
    assert not (run.root / "trackers").exists()


# ---------------------------------------------------------------------- in the background


def test_calls_come_in_their_order_and_the_end_waits_for_them(run: Run) -> None:
    slow = Fake(step=lambda: time.sleep(0.05))
    assert tell_all(BackgroundTracker("mlflow", run, slow)) == []
    assert slow.heard == [
        ("begin",),
        ("step", [(1, {"step/loss": 2.0, "step/lr": 0.1}), (2, {"step/lr": 0.2})]),
        ("epoch", [(1, scalars(RECORD))]),
        ("end", "done"),
    ]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_after_an_interruption_steps_are_told_once_and_missed_epochs_too(
    epochs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fake = Fake()
    monkeypatch.setattr(background, "_maker", lambda name: fake)
    run = Run.create(ExperimentConfig(storage_path=tmp_path, tracking=(name,)), argv=[])
    writer = epochs.begun(run)
    writer.plot_steps(1, [4.0, 3.0, None], [0.1, 0.2, None])
    epochs.add(writer, 1)
    writer.end("stopped")
    assert (recall(run, name)["step"], recall(run, name)["epoch"]) == (3, 1)
    with monkeypatch.context() as killed:
        killed.setattr(RunWriter, "_plot", lambda *_: None)
        epochs.add(RunWriter(run), 2)  # an epoch of which it was not told
    writer = epochs.begun(run)
    writer.plot_steps(2, [3.0], [0.2])
    writer.plot_steps(3, [2.0, 1.0], [0.3, 0.4])
    epochs.add(writer, 3)
    writer.end("done")
    told = [(call[0], [number for number, _ in call[1]]) for call in fake.heard if call[0] in ("step", "epoch")]
    assert told == [("step", [1, 2]), ("epoch", [1]), ("step", []), ("step", [4]), ("epoch", [2, 3])]
    assert (recall(run, name)["step"], recall(run, name)["epoch"]) == (4, 3)


@pytest.mark.parametrize("call", ["begin", "step", "epoch", "end"])
def test_an_error_is_one_warning(run: Run, call: str) -> None:
    fake = Fake(**{call: unreachable})
    tracker = BackgroundTracker("mlflow", run, fake)
    assert tell_all(tracker) == [
        "tracking: mlflow: ConnectionError: nobody answers; the run goes on, metrics.csv has it all"
    ]
    assert tracker.take_warnings() == []
    heard = [name for name, *_ in fake.heard]
    assert heard == ([] if call == "begin" else [n for n in ("begin", "step", "epoch", "end") if n != call])


def test_one_that_comes_back_is_told_again(run: Run) -> None:
    down = [True]

    def sometimes() -> None:
        if down[0]:
            raise ConnectionError("not yet")

    fake = Fake(begin=sometimes)
    tracker = BackgroundTracker("mlflow", run, fake)
    tracker.begin()
    deadline = time.monotonic() + 30
    while not tracker.warnings and time.monotonic() < deadline:
        time.sleep(0.01)
    down[0] = False
    assert len(tell_all(tracker)) == 1
    assert [name for name, *_ in fake.heard] == ["begin", "step", "epoch", "end"]


def test_one_that_exits_or_hangs_holds_nobody_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> None:
        raise SystemExit(3)

    (warning,) = tell_all(BackgroundTracker("wandb", run, Fake(begin=leave)))
    assert warning.startswith("tracking: wandb: SystemExit: 3; ")

    monkeypatch.setattr(background, "END_S", 0.05)
    monkeypatch.setattr(background, "WAITING", 2)
    stuck = threading.Event()
    tracker = BackgroundTracker("wandb", run, Fake(begin=lambda: bool(stuck.wait(60)) and None))
    for step in range(20):
        tracker.steps(step, [1.0], [0.1])  # more than can wait
    (warning,) = tell_all(tracker)
    assert warning.startswith("tracking: wandb: it does not answer; ")
    stuck.set()


def test_a_run_goes_on_where_its_tracker_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_maker", lambda name: Fake(epoch=unreachable))
    run = Run.create(ExperimentConfig(storage_path=tmp_path, tracking=("tensorboard", "mlflow", "wandb")), argv=[])
    writer = RunWriter(run)
    writer.begin({"warnings": ["another"]}, {"kind": "tokens", "val_sha": "x"})
    files = {"state.safetensors": b"", "state.json": b"{}"}
    for epoch in (1, 2):
        writer.epoch({**RECORD.to_json(), "epoch": epoch}, files, b"", {"epoch": epoch})
    writer.end("done")
    assert [line.epoch for line in run.records()] == [1, 2]
    said = "ConnectionError: nobody answers; the run goes on, metrics.csv has it all"
    assert run.meta()["warnings"] == ["another", f"tracking: mlflow: {said}", f"tracking: wandb: {said}"]
    assert run.status() == "done"
    assert run.tb.is_dir()


def test_a_worker_hears_of_a_failure_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_maker", lambda name: Fake(begin=unreachable))
    run = Run.create(ExperimentConfig(storage_path=tmp_path, tracking=("mlflow",)), argv=[])
    writer = RunWriter(run)
    writer.begin({}, {"kind": "tokens", "val_sha": "x"})
    found: list[str] = []
    deadline = time.monotonic() + 30
    while not found and time.monotonic() < deadline:
        found = writer.plot_steps(1, [1.0], [0.1])
        time.sleep(0.01)
    assert len(found) == 1
    assert writer.plot_steps(2, [1.0], [0.1]) == []
    writer.end("done")
    assert "warnings" not in run.meta()  # the worker has noted it


def test_the_driver_ends_what_a_lost_worker_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setattr(background, "_maker", lambda name: fake)
    run = Run.create(ExperimentConfig(storage_path=tmp_path, tracking=("mlflow",)), argv=[])
    RunWriter(run).end("failed", "before any worker began")
    assert fake.heard == []
    remember(run, "mlflow", run_id="x", under_way=True)
    RunWriter(run).end("failed", "the worker was lost")
    assert fake.heard == [("begin",), ("end", "failed")]
    remember(run, "mlflow", under_way=False)
    assert told(run) == []


def test_the_driver_ends_what_a_worker_in_its_own_process_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Fake] = []
    monkeypatch.setattr(background, "_maker", lambda name: lambda run: made.append(Fake()) or made[-1])
    run = Run.create(ExperimentConfig(storage_path=tmp_path, tracking=("wandb",)), argv=[])
    worker = RunWriter(run)
    worker.begin({}, {"kind": "tokens", "val_sha": "x"})
    remember(run, "wandb", under_way=True)
    RunWriter(run).end("failed", "the worker met with an error")
    assert [fake.heard[-1] for fake in made] == [("end", "failed")]


def test_a_process_that_trains_many_runs_keeps_no_tracker_that_has_ended(
    epochs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_maker", lambda name: Fake())
    for number in range(3):
        config = ExperimentConfig(storage_path=tmp_path, tracking=("mlflow",), name=f"run{number}")
        epochs.begun(Run.create(config, argv=[])).end("done")
    assert len([run for run, _ in opening._live if run.parent == tmp_path]) == 1


# ---------------------------------------------------------------------- what they are told


def test_places_are_handed_on_and_secrets_are_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("WANDB_MODE", "offline")
    hand_on(run, ["tensorboard", "mlflow", "wandb"])
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
        monkeypatch.delenv(name)  # another process, on another host
    assert environment(run, "mlflow") == {"MLFLOW_TRACKING_URI": "http://tracking:5000"}
    assert environment(run, "wandb") == {"WANDB_MODE": "offline"}
    for place in ("http://me:secret@elsewhere", "http://me:secret@[::1"):  # the second is no URL
        monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
        hand_on(run, ["mlflow"])
    assert not [path for path in run.root.rglob("*") if path.is_file() and "secret" in path.read_text()]


def test_what_is_noted_is_kept_beside_the_rest(run: Run) -> None:
    assert recall(run, "mlflow") == {}
    remember(run, "mlflow", run_id="a")
    remember(run, "mlflow", step=3)
    assert recall(run, "mlflow") == {"run_id": "a", "step": 3}
    (run.root / "trackers" / "mlflow.json").write_text("[")
    assert recall(run, "mlflow") == {}


def test_parameters_are_the_configuration_and_the_runs_id(run: Run) -> None:
    found = parameters(run)
    assert found["run"] == run.id
    assert found["optimizer.name"] == "sgd"
    assert found["data.augment.scale"] == "[0.08, 1.0]"
    assert found["lr"] == json.dumps(run.config().lr)
    assert found["model.name"] == "resnet18"


def test_points_leave_out_what_is_not_known() -> None:
    assert list(points(5, [1.0, None, None], [0.1, 0.2, None])) == [
        (5, {"step/loss": 1.0, "step/lr": 0.1}), (6, {"step/lr": 0.2})
    ]  # fmt: skip
    assert scalars(RECORD)["metric/ppl"] == 2.5
