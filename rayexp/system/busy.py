"""How much of the time a device computes: of cores the processor time, of a GPU what NVML samples; and how much others
compute on this machine."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import psutil

SAMPLE_S = 0.1  # NVML says whether a kernel ran in the last sixth of a second to second
LOOK_S = 1.0  # in which others are watched: a hundred ticks of the machine's clock


class BusyMeter:
    """The share of the time in which this process's device computes.

    Args:
        cores: that the process may compute on.
        gpu: the UUID of its GPU, as NVML has it (`GPU-...`); None: it computes on its cores.
    """

    def __init__(self, cores: float, gpu: str | None = None) -> None:
        self._cores = cores
        self._end = threading.Event()
        self._samples: list[float] = []
        self._thread: threading.Thread | None = None
        self._gpu = gpu is not None
        if gpu is not None and (handle := _handle(gpu)) is not None:
            self._thread = threading.Thread(target=self._sample, args=(handle,), name="busy", daemon=True)
            self._thread.start()
        self._before = self._now()

    def take(self) -> float | None:
        """The share since the last look, from 0 to 1; None where NVML does not tell of a GPU."""
        if self._gpu:
            samples, self._samples = self._samples, []
            return sum(samples) / len(samples) if samples else None
        (wall, used), before = self._now(), self._before
        self._before = wall, used
        share = (used - before[1]) / max(1e-9, (wall - before[0]) * self._cores)
        return min(1.0, max(0.0, share))  # a process that has ended takes its time with it

    def close(self) -> None:
        """Sample no more."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _now(self) -> tuple[float, float]:
        """Wall-clock, and processor time of this process and of those that it has started (a loader's)."""
        return time.perf_counter(), _mine()

    def _sample(self, handle: Any) -> None:
        import pynvml

        while not self._end.wait(SAMPLE_S):
            with contextlib.suppress(pynvml.NVMLError):
                self._samples.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)


def others() -> dict[str, float]:
    """How much of this machine other processes than this one and its children take, now.

    A load average would not do: it is of the last minutes, in which this process may have trained itself.

    Returns:
        `cores` that they keep busy, `of` so many.
    """
    machine, mine, begin = _machine(), _mine(), time.perf_counter()
    time.sleep(LOOK_S)
    took = time.perf_counter() - begin
    busy = (_machine() - machine) - (_mine() - mine)
    return {"cores": round(max(0.0, busy) / took, 2), "of": psutil.cpu_count() or 1}


def _mine() -> float:
    """Seconds of processor time of this process and of those that it has started."""
    me = psutil.Process()
    used = 0.0
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            used += times.user + times.system
    return used


def _machine() -> float:
    """Seconds of processor time of everything on the machine, and those that its host has taken from it."""
    times = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")  # guests are in `user`
    return float(sum(getattr(times, kind, 0.0) for kind in kinds))


def _handle(gpu: str) -> Any:
    """NVML's handle of a GPU; None where there is no library, driver, permission or such GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
        pynvml.nvmlDeviceGetUtilizationRates(handle)  # a slice of a GPU has none
    except Exception:  # as runtime.energy: whatever is missing, there is no figure
        return None
    return handle
