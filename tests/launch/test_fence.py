"""Workers that outlive a killed driver write nothing more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rayexp.config import ExperimentConfig
from rayexp.launch import fence
from rayexp.launch.faults import LostError
from rayexp.launch.fence import Fenced
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter
from rayexp.system.locks import only_driver

Tiny = Callable[..., ExperimentConfig]


def files(made: Run) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in made.root.rglob("*") if path.is_file() and path.name != "driver.lock"}


def test_a_worker_writes_only_for_its_own_driver(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "LOOK_S", 0.0)
    made = Run.create(tiny(), argv=[])
    with only_driver(made.root) as driver:
        mine = Fenced(RunWriter(made), driver.token)
        assert mine.driven()
        mine.snapshot(3, {"state.json": b"{}"})
        mine.log(0, "alive")
        assert not mine.stop_requested()
    before = files(made)

    def refused() -> None:
        assert not mine.driven()
        with pytest.raises(LostError, match="its driver has ended"):
            mine.snapshot(4, {"state.json": b"{}"})
        with pytest.raises(LostError):
            mine.end("done")
        with pytest.raises(LostError):
            mine.stop_requested()
        mine.log(0, "orphaned")  # while an error is handled: it must not raise another one
        assert files(made) == before

    refused()
    with only_driver(made.root):  # another driver has resumed the run
        refused()


def test_a_worker_that_steps_looks_after_its_driver(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(fence.time, "monotonic", lambda: now[0])
    made = Run.create(tiny(), argv=[])
    mine = Fenced(RunWriter(made), "of a driver that is gone")
    with pytest.raises(LostError):
        mine.stop_requested()
    now[0] += fence.LOOK_S / 2
    assert not mine.stop_requested()  # most steps do not read the lock
    made.stop_path.touch()
    assert mine.stop_requested()
    now[0] += fence.LOOK_S
    with pytest.raises(LostError):
        mine.stop_requested()


def test_looking_is_not_in_the_way_of_the_next_driver(tiny: Tiny) -> None:
    made = Run.create(tiny(), argv=[])
    mine, over = Fenced(RunWriter(made), "gone"), threading.Event()
    threads = [threading.Thread(target=lambda: [mine.driven() for _ in iter(over.is_set, True)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            with only_driver(made.root):
                time.sleep(0.001)
    finally:
        over.set()
        for thread in threads:
            thread.join()
