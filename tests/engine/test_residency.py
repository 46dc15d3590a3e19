"""Whether a GPU keeps the samples: what is asked for, what its memory holds, and who shares it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.residency import keep_samples

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@dataclass
class Machine:
    """As much of a runtime and of a workload as is asked."""

    free: int = 1000
    needed: int = 400
    room: int = 1 << 40
    device: torch.device = GPU
    taken: list[torch.device] = field(default_factory=list)

    def free_memory(self) -> int:
        return self.free

    def resident_bytes(self) -> int:
        return self.needed

    def resident(self, device: torch.device) -> None:
        if self.needed > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.taken.append(device)


def keep(machine: Machine, asked: Any = "auto", **scaling: Any) -> Any:
    config = parse({"data": {"name": "shapes", "resident": asked}, "scaling": scaling}, ExperimentConfig, "test")
    return keep_samples(config, machine, machine)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("needed", "asked", "kept"),
    [(400, "auto", True), (500, "auto", False), (500, True, True), (5000, True, True), (1, False, False)],
)
def test_less_than_half_of_what_is_free_is_kept(needed: int, asked: Any, kept: bool) -> None:
    machine = Machine(needed=needed)
    found = keep(machine, asked)
    assert (found.kept, found.bytes, found.free, found.asked) == (kept, needed, 1000, asked)
    assert machine.taken == [GPU] * kept


def test_workers_that_share_a_gpu_share_its_memory() -> None:
    """They all ask before any of them has taken its part."""
    assert keep(Machine(needed=200), num_workers=2, gpus_per_worker=0.5).kept
    assert not keep(Machine(needed=400), num_workers=2, gpus_per_worker=0.5).kept
    assert keep(Machine(needed=400), num_workers=2, gpus_per_worker=2).kept
    assert keep(Machine(needed=400), num_workers=0, gpus_per_worker=0.5).kept


def test_where_others_were_faster_samples_are_sent() -> None:
    machine = Machine(room=300)
    assert not keep(machine).kept
    assert machine.taken == []
    with pytest.raises(torch.OutOfMemoryError):
        keep(machine, True)


@pytest.mark.parametrize("machine", [Machine(device=CPU), Machine(needed=0)])
def test_where_there_is_nothing_to_keep_nothing_is_asked(machine: Machine) -> None:
    assert keep(machine, True) is None
    assert machine.taken == []
