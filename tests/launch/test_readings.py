"""What the devices of two workers did, against an NVML whose figures are known."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest

from rayexp.engine.runtime import Runtime
from rayexp.launch.readings import DeviceReadings

WORLD = 2


class Together:
    """A worker of a group whose members are threads."""

    def __init__(self, rank: int, shared: dict[int, bytes], barrier: threading.Barrier) -> None:
        self.rank, self.shared, self.barrier = rank, shared, barrier

    def gather(self, data: bytes) -> list[bytes]:
        self.shared[self.rank] = data
        self.barrier.wait()
        found = [self.shared[rank] for rank in range(WORLD)]
        self.barrier.wait()
        return found


class OnGpu:
    """A worker's place on a GPU; its energy is read as ever."""

    energy = Runtime.energy

    def __init__(self, gpu: str) -> None:
        self.gpu = gpu

    def gpu_id(self) -> str:
        return self.gpu


class Nvml:
    """GPUs by UUID: percent of the time that each computes, and millijoules that it has used; what is not here, NVML
    does not tell."""

    def __init__(self) -> None:
        self.percent: dict[str, int] = {}
        self.millijoules: dict[str, int] = {}

    def module(self) -> types.ModuleType:
        class NVMLError(Exception):
            pass

        def asked(figures: dict[str, int]) -> Callable[[str], int]:
            def tell(gpu: str) -> int:
                if gpu not in figures:
                    raise NVMLError
                return figures[gpu]

            return tell

        percent = asked(self.percent)
        made: Any = types.ModuleType("pynvml")
        made.NVMLError, made.nvmlInit = NVMLError, lambda: None
        made.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
        made.nvmlDeviceGetUtilizationRates = lambda gpu: types.SimpleNamespace(gpu=percent(gpu))
        made.nvmlDeviceGetTotalEnergyConsumption = asked(self.millijoules)
        return made  # type: ignore[no-any-return]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    made = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", made.module())
    monkeypatch.setattr("rayexp.system.busy.SAMPLE_S", 0.001)
    return made


def epoch(gpus: list[str], meanwhile: Callable[[], None]) -> list[tuple[float | None, float | None]]:
    """The readings of every worker after an epoch in which `meanwhile` happened."""
    shared: dict[int, bytes] = {}
    barrier = threading.Barrier(WORLD, timeout=20)
    found: dict[int, tuple[float | None, float | None]] = {}

    def worker(rank: int) -> None:
        readings = DeviceReadings(Together(rank, shared, barrier), OnGpu(gpus[rank]), 1.0)  # type: ignore[arg-type]
        if rank == 0:
            meanwhile()
        until = time.monotonic() + 20
        while readings._meter._thread and not readings._meter._samples and time.monotonic() < until:
            time.sleep(0.001)
        barrier.wait()
        found[rank] = readings.take()
        readings.close()

    threads = [threading.Thread(target=worker, args=(rank,), daemon=True) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[rank] for rank in range(WORLD)]


def test_two_gpus_count_both(nvml: Nvml) -> None:
    """The mean of how busy they are, and the joules of both; every worker is told the same."""
    nvml.percent.update({"GPU-a": 20, "GPU-b": 60})
    nvml.millijoules.update({"GPU-a": 1_000_000, "GPU-b": 5_000_000})

    def meanwhile() -> None:
        nvml.millijoules.update({"GPU-a": 1_005_000, "GPU-b": 5_007_000})

    assert epoch(["GPU-a", "GPU-b"], meanwhile) == [(pytest.approx(12), pytest.approx(0.4))] * WORLD


def test_workers_that_share_a_gpu_have_used_it_once(nvml: Nvml) -> None:
    nvml.percent["GPU-a"] = 50
    nvml.millijoules["GPU-a"] = 1_000_000

    def meanwhile() -> None:
        nvml.millijoules["GPU-a"] = 1_003_000

    assert epoch(["GPU-a", "GPU-a"], meanwhile) == [(pytest.approx(3), pytest.approx(0.5))] * WORLD


def test_a_gpu_that_does_not_tell_leaves_the_share_open(nvml: Nvml) -> None:
    """Half of the workers are no share of all of them; energy that was counted was used."""
    nvml.percent["GPU-a"] = 20
    nvml.millijoules["GPU-a"] = 1_000_000

    def meanwhile() -> None:
        nvml.millijoules["GPU-a"] = 1_004_000

    assert epoch(["GPU-a", "GPU-b"], meanwhile) == [(pytest.approx(4), None)] * WORLD


def test_without_any_figure_nothing_is_said(nvml: Nvml) -> None:
    assert epoch(["GPU-a", "GPU-b"], lambda: None) == [(None, None)] * WORLD
