"""Decide how many workers compute on which device, with how many cores. Plain arithmetic, without torch and Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rayexp.config import ExperimentConfig
from rayexp.display import counted
from rayexp.errors import UserError
from rayexp.system.threads import threads_per_shard

_ROUNDING = 1e-6  # resources are floats: eight times 0.25 must fit into 2


@dataclass(frozen=True, slots=True)
class Node:
    """What one machine offers.

    Attributes:
        name: for messages and placement: its address in Ray.
        cpus: cores, fractions allowed.
        gpus: GPUs, fractions allowed.
    """

    name: str
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Placement:
    """How the workers of one attempt are placed.

    Attributes:
        workers: 0 (in-process) or the number of workers.
        gpu: whether they compute on GPUs.
        cpus: cores of each; a fraction shares a core. None: all that the process may use (in-process).
        gpus: GPUs of each (0 on CPUs); a fraction shares a GPU.
    """

    workers: int
    gpu: bool
    cpus: float | None
    gpus: float = 0.0

    def __str__(self) -> str:
        where = "in this process" if not self.workers else f"{counted(self.workers, 'worker')} on Ray"
        cores = "" if self.cpus is None else f", {self.cpus:g} CPU each"
        return f"{where}, {'GPU' if self.gpu else 'CPU'}{cores}"


def with_threads(config: ExperimentConfig, plan: Placement, cores: float) -> ExperimentConfig:
    """The configuration with `threads_per_shard` decided, where it leaves that open and the workers compute on CPUs.

    Args:
        config: of a run that begins.
        plan: of its first attempt.
        cores: of this process, for a run in it.
    """
    if config.threads_per_shard is not None or plan.gpu:
        return config
    together = cores if plan.cpus is None else plan.workers * plan.cpus
    return config.model_copy(update={"threads_per_shard": threads_per_shard(together, config.shards)})


def capacity(nodes: Sequence[Node], cpus: float, gpus: float) -> int:
    """How many workers with so many cores and GPUs each these machines hold."""
    return sum(_workers_on(node, cpus, gpus) for node in nodes)


def make(config: ExperimentConfig, nodes: Sequence[Node]) -> Placement:
    """The largest allowed number of workers that can be placed; see `choices`."""
    return choices(config, nodes)[0]


def choices(config: ExperimentConfig, nodes: Sequence[Node]) -> list[Placement]:
    """The placements that an elastic run may use, the largest first; one where the number of workers is fixed.

    Args:
        config: `scaling` says what is asked for.
        nodes: all machines with all their resources, whether these are free at present or not.

    Raises:
        UserError: so many workers can never be placed; the line says what is there and what was asked for.
    """
    s = config.scaling
    low, high = s.num_workers if isinstance(s.num_workers, tuple) else (s.num_workers, s.num_workers)
    gpus_there = sum(node.gpus for node in nodes)
    if high == 0:
        if s.use_gpu is True and not gpus_there:
            raise UserError("scaling.use_gpu: true, but this machine has no CUDA device; allowed here: auto, false")
        gpu = s.use_gpu is not False and gpus_there > 0
        return [Placement(0, gpu, None, float(gpu))]
    wanted = [n for n in reversed(config.allowed_workers) if low <= n <= high]
    for gpus in [s.gpus_per_worker] * (s.use_gpu is not False) + [0.0] * (s.use_gpu is not True):
        if plans := [plan for n in wanted if (plan := _placed(config, nodes, n, gpus))]:
            return plans
    there = (
        "; ".join(f"{node.name}: {counted(node.cpus, 'CPU')}, {counted(node.gpus, 'GPU')}" for node in nodes)
        or "nothing"
    )
    size = f"{s.cpus_per_worker or 1:g} CPU" + (f" and {s.gpus_per_worker:g} GPU" if s.use_gpu is True else "")
    raise UserError(
        f"scaling.num_workers: {counted(min(wanted), 'worker')} of {size} each can never be placed; there is {there}; "
        "fewer workers (or a smaller scaling.cpus_per_worker or gpus_per_worker) are possible"
    )


def _placed(config: ExperimentConfig, nodes: Sequence[Node], workers: int, gpus: float) -> Placement | None:
    """So many workers, each with as many cores as possible; None if they cannot be placed."""
    if config.scaling.cpus_per_worker is not None:
        sizes: Sequence[float] = [config.scaling.cpus_per_worker]
    elif isinstance(config.scaling.num_workers, tuple):
        sizes = [1.0]  # with shared cores an elastic run would always have the largest number of workers
    else:
        share = math.floor(sum(node.cpus for node in nodes) / workers)
        sizes = [*range(share, 0, -1), 0.5, 0.25, 0.125]
    for cpus in sizes:
        if capacity(nodes, cpus, gpus) >= workers:
            return Placement(workers, gpus > 0, float(cpus), gpus)
    return None


def _workers_on(node: Node, cpus: float, gpus: float) -> int:
    """How many workers of that size one machine holds."""
    by_cpu = math.floor(node.cpus / cpus + _ROUNDING)
    if not gpus:
        return by_cpu
    if gpus >= 1:
        return min(by_cpu, math.floor(node.gpus / gpus + _ROUNDING))
    # A fraction lies within one GPU.
    whole = math.floor(node.gpus + _ROUNDING)
    by_gpu = whole * math.floor(1 / gpus + _ROUNDING) + math.floor((node.gpus - whole) / gpus + _ROUNDING)
    return min(by_cpu, by_gpu)
