"""How much of the time a device computes."""

from __future__ import annotations

import sys
import time
import types

import pytest

from rayexp.system.busy import BusyMeter


def burn(seconds: float) -> None:
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass


def test_processor_time_is_a_share_of_what_the_cores_could_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own, since a test that times fails on a busy machine."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = BusyMeter(cores=2)
    burn(0.05)
    clock[0] = 0.1
    share = meter.take()
    assert share is not None
    assert 0.2 <= share <= 1
    clock[0] = 1000.0
    assert meter.take() == pytest.approx(0, abs=0.01)  # counts since the last look


def nvml(monkeypatch: pytest.MonkeyPatch, readings: list[int]) -> None:
    """An NVML whose GPU is as busy as that, the last for ever; none: it tells nothing."""

    class NVMLError(Exception):
        pass

    def rates(handle: object) -> types.SimpleNamespace:
        if not readings:
            raise NVMLError
        return types.SimpleNamespace(gpu=readings.pop(0) if len(readings) > 1 else readings[0])

    module = types.ModuleType("pynvml")
    fields = {
        "NVMLError": NVMLError, "nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetUtilizationRates": rates,
    }  # fmt: skip
    for name, value in fields.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_a_gpu_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayexp.system.busy.SAMPLE_S", 0.001)
    nvml(monkeypatch, [0, 40])
    meter = BusyMeter(cores=2, gpu="GPU-1")
    deadline = time.monotonic() + 20
    while not meter._samples and time.monotonic() < deadline:
        time.sleep(0.001)
    assert meter.take() == pytest.approx(0.4)
    meter.close()
    meter.take()
    assert meter.take() is None  # nobody samples any more


def test_a_gpu_that_is_not_told_of_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch, [])
    meter = BusyMeter(cores=2, gpu="GPU-1")
    assert meter.take() is None
    meter.close()
