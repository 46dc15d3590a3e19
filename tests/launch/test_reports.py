"""What workers and Ray Train tell each other, with a Ray Train made of a barrier."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayexp.config import ExperimentConfig
from rayexp.errors import RunError, UserError
from rayexp.launch.faults import LostError
from rayexp.launch.job import WorkerJob
from rayexp.launch.on_ray import reports
from rayexp.launch.on_ray.reports import Reports
from rayexp.launch.worker_fault import WorkerFaultError, find
from rayexp.runs.records import EpochRecord

Tiny = Callable[..., ExperimentConfig]
WORLD = 2


class FakeTrain:
    """Ray Train for two workers, which its threads are: every call waits for the other worker's."""

    def __init__(self, storage: Path) -> None:
        self.barrier = threading.Barrier(WORLD)
        self.storage = storage
        self.preempted: list[str] = []
        self.calls: dict[int, list[Any]] = {0: [], 1: []}
        self.told = 0
        self.ranks: dict[int, int] = {}

    def rank(self) -> int:
        return self.ranks[threading.get_ident()]

    def broadcast_from_rank_zero(self, data: int) -> int:
        rank = self.ranks.setdefault(threading.get_ident(), 0 if data != 0 else 1)
        if rank == 0:
            self.told = data
        self.barrier.wait(20)
        data = self.told
        self.barrier.wait(20)
        return data

    def report(self, metrics: dict[str, Any], checkpoint: Any, checkpoint_upload_mode: Any) -> None:
        self.barrier.wait(20)
        self.calls[self.rank()].append((metrics, checkpoint))

    def get_preemption_info(self) -> Any:
        self.barrier.wait(20)
        self.calls[self.rank()].append("look")
        return SimpleNamespace(preempted_node_ids=list(self.preempted)) if self.preempted else None

    def get_context(self) -> Any:
        return SimpleNamespace(get_storage=lambda: SimpleNamespace(experiment_fs_path=str(self.storage)))


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrain]:
    fake = FakeTrain(tmp_path)
    monkeypatch.setattr(reports, "ray", SimpleNamespace(train=fake))
    monkeypatch.setattr(reports, "collective", fake)
    monkeypatch.setattr(reports, "LOOK_S", 0.02)
    monkeypatch.setattr(reports, "CLOSE_S", 5.0)
    monkeypatch.delenv(reports.WATCHED, raising=False)
    yield fake
    fake.barrier.abort()


def job(config: ExperimentConfig, tmp_path: Path) -> WorkerJob:
    return WorkerJob(run=tmp_path / "run", config=config, device="cpu")


def record(epoch: int) -> EpochRecord:
    return EpochRecord(epoch, epoch * 3, 1.5, 2.5, {"acc1": 50.0}, 0.1, 10.0, {"total": 1.0}, weights_sha="")


def epochs(train: FakeTrain, rank: int) -> list[int]:
    return [call[0]["epoch"] for call in train.calls[rank] if call != "look"]


def workers(config: ExperimentConfig, tmp_path: Path) -> list[Reports]:
    made = [Reports(job(config, tmp_path), rank, print) for rank in range(WORLD)]
    assert [each.leaving() for each in made] == [False, False]
    return made


def test_every_worker_reports_the_same_epochs_and_the_last_of_all(tiny: Tiny, tmp_path: Path, train: FakeTrain) -> None:
    made = workers(tiny(), tmp_path)
    for epoch in range(1, 41):
        for worker in reversed(made) if epoch % 2 else made:
            worker.epoch(record(epoch))
    for thread in [threading.Thread(target=worker.close) for worker in made]:
        thread.start()
    for worker in made:
        worker.close()
    assert epochs(train, 0) == epochs(train, 1)
    assert epochs(train, 0)[-1] == 40
    metrics, checkpoint = next(call for call in reversed(train.calls[0]) if call != "look")
    assert metrics == {key: value for key, value in record(40).to_json().items() if isinstance(value, int | float)}
    assert metrics["acc1"] == 50.0
    told = json.loads(Path(checkpoint.path, "epoch.json").read_text())
    assert told == {"run": str(tmp_path / "run"), "epoch": 40}
    assert all(call == "look" or call[1] is None for call in train.calls[1])


def test_a_node_that_is_about_to_go_is_told_once(
    tiny: Tiny, tmp_path: Path, train: FakeTrain, until: Callable[..., None]
) -> None:
    made = workers(tiny(), tmp_path)
    until(lambda: len(train.calls[0]) > 2, 20)
    assert [each.leaving() for each in made] == [False, False]
    train.preempted = ["a"]
    until(lambda: made[0].leaving(), 20)
    looks = len(train.calls[0])
    until(lambda: len(train.calls[0]) > looks + 2, 20)
    assert not made[0].leaving()
    train.preempted = ["a", "b"]
    until(lambda: made[0].leaving(), 20)
    for worker in made:
        threading.Thread(target=worker.close).start()


def test_a_ray_that_does_not_watch_is_not_asked(
    tiny: Tiny, tmp_path: Path, train: FakeTrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(reports.WATCHED, "0")
    made = workers(tiny(), tmp_path)
    time.sleep(0.2)
    for worker in made:
        worker.epoch(record(1))
        threading.Thread(target=worker.close).start()
    for worker in made:
        worker.close()
    assert [epochs(train, rank) for rank in range(WORLD)] == [[1], [1]]
    assert "look" not in train.calls[0]


def test_training_waits_for_no_answer(
    tiny: Tiny, tmp_path: Path, train: FakeTrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "CLOSE_S", 0.1)
    alone = Reports(job(tiny(), tmp_path), 0, print)  # the other worker never comes, nor does an answer
    for epoch in range(1, 100):
        assert not alone.leaving()
        alone.epoch(record(epoch))
    alone.close()
    assert train.calls[0] == []


def test_a_ray_that_fails_is_told_no_more(
    tiny: Tiny, tmp_path: Path, train: FakeTrain, until: Callable[..., None]
) -> None:
    lines: list[str] = []
    alone = Reports(job(tiny(), tmp_path), 0, lines.append)
    assert not alone.leaving()
    train.barrier.abort()
    until(lambda: lines, 20)
    assert lines == ["Ray Train is told no more: BrokenBarrierError: "]
    alone.close()


@pytest.mark.parametrize(
    "error",
    [
        UserError("data.root: /x: missing\nand more", " (see FILE)"),
        RunError("the loss is nan {", "; --resume X goes on"),
        LostError("lost touch with a peer"),
    ],
)
def test_an_error_of_a_worker_arrives_with_kind_and_line(error: Any) -> None:
    try:
        raise WorkerFaultError.of(error)
    except WorkerFaultError as raised:
        found = find(f"Traceback (most recent call last):\n  File\nX: {raised}\n")
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)
    assert find("SIGSEGV") is None
