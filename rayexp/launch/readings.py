"""What the devices of all workers did in an epoch: how much of the time they computed, and the energy of GPUs."""

from __future__ import annotations

import json

from rayexp.engine.group import WorkerGroup
from rayexp.engine.runtime import Runtime
from rayexp.system.busy import BusyMeter


class DeviceReadings:
    """Counts from when it is made; every worker makes one and takes its readings at the same places.

    Args:
        group: the workers.
        runtime: where this one computes.
        cores: that it may compute on, if it does so on cores.
    """

    def __init__(self, group: WorkerGroup, runtime: Runtime, cores: float) -> None:
        self._group, self._runtime = group, runtime
        self._meter = BusyMeter(cores, runtime.gpu_id())
        self._energy: dict[str, float] = {}  # joules at the last look, by GPU
        self.take()

    def take(self) -> tuple[float | None, float | None]:
        """Joules of the workers' GPUs since the last look, and the share of the time in which the workers' devices
        computed; None where that is not known."""
        mine = {"energy": self._runtime.energy(), "busy": self._meter.take()}
        parts = [json.loads(part) for part in self._group.gather(json.dumps(mine).encode())]
        before, self._energy = self._energy, {gpu: joules for part in parts for gpu, joules in part["energy"].items()}
        used = sum(self._energy[gpu] - before[gpu] for gpu in self._energy.keys() & before.keys())
        busy = [part["busy"] for part in parts]
        return used or None, None if None in busy else sum(busy) / len(busy)

    def close(self) -> None:
        """Read no more."""
        self._meter.close()
