"""How much of the time a device computes, and what others do on the machine."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from collections.abc import Callable

import psutil
import pytest

from rayexp.system.busy import BusyMeter, others


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


# ---------------------------------------------------------------------- what others do


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, Callable[[], None]], float]:
    """Watch the machine for five seconds of the test's own clock, in which it computes so many seconds, and this
    process does something; returns the cores that others kept busy."""

    def watch(seconds: float, meanwhile: Callable[[], None]) -> float:
        clock, spent = [100.0], [1000.0]

        def sleep(_: float) -> None:
            meanwhile()
            clock[0] += 5
            spent[0] += seconds

        names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda: clock[0])
            patch.setattr(time, "sleep", sleep)
            # Half of it in user, half taken away by the host; guests are in user, and waiting is not computing.
            patch.setattr(
                psutil,
                "cpu_times",
                lambda: types.SimpleNamespace(
                    **dict.fromkeys(names, 7 * clock[0]) | dict.fromkeys(("nice", "system", "irq", "softirq"), 0.0)
                    | {"user": spent[0] / 2, "steal": spent[0] / 2}
                ),
            )  # fmt: skip
            found = others()
        assert found["of"] == psutil.cpu_count()
        return found["cores"]

    return watch


def test_what_others_compute_is_seen(watched: Callable[..., float]) -> None:
    assert watched(7.5, lambda: None) == pytest.approx(1.5, abs=0.05)
    assert watched(0, lambda: None) == 0


def test_what_this_process_computes_is_not_others(watched: Callable[..., float]) -> None:
    before = time.process_time()
    mine = watched(1.0, lambda: burn(0.8))
    assert mine == pytest.approx((1.0 - (time.process_time() - before)) / 5, abs=0.03)


def test_what_a_process_of_ours_computes_is_not_others(watched: Callable[..., float]) -> None:
    """One that has begun before; what it has computed until then is in neither look."""
    script = (
        "import time\ninput()\nwhile time.process_time() < 0.8: pass\nprint(time.process_time(), flush=True)\ninput()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert child.stdin is not None
    assert child.stdout is not None
    took = []

    def meanwhile() -> None:
        child.stdin.write("\n")
        took.append(float(child.stdout.readline()))

    try:
        assert watched(1.0, meanwhile) <= (1.0 - 0.7) / 5
        assert took[0] >= 0.8
    finally:
        child.kill()
        child.communicate()
