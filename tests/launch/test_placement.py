from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rayexp.config import ExperimentConfig
from rayexp.errors import UserError
from rayexp.launch.placement import Node, Placement, capacity, choices, make, with_threads

Tiny = Callable[..., ExperimentConfig]


def scaled(tiny: Tiny, shards: int = 8, **scaling: Any) -> ExperimentConfig:
    return tiny(shards=shards, scaling=scaling)


@pytest.mark.parametrize(
    ("workers", "cpus", "each"), [(1, 2, 2), (2, 2, 1), (4, 2, 0.5), (8, 2, 0.25), (8, 64, 8), (4, 6, 1), (8, 1, 0.125)]
)
def test_cores_are_shared_out(tiny: Tiny, workers: int, cpus: int, each: float) -> None:
    assert make(scaled(tiny, num_workers=workers), [Node("a", cpus)]) == Placement(workers, False, each)


def test_in_process_has_all_cores(tiny: Tiny) -> None:
    assert make(scaled(tiny, num_workers=0), [Node("a", 16)]) == Placement(0, False, None)
    assert make(scaled(tiny, num_workers=0), [Node("a", 16, 1)]).gpu
    assert not make(scaled(tiny, num_workers=0, use_gpu=False), [Node("a", 16, 1)]).gpu


def test_a_size_that_the_user_set_is_kept(tiny: Tiny) -> None:
    config = scaled(tiny, num_workers=4, cpus_per_worker=1.5)
    assert make(config, [Node("a", 4), Node("b", 4)]).cpus == 1.5
    with pytest.raises(UserError, match=r"num_workers: 4 workers of 1.5 CPU.*a: 4 CPUs"):
        make(config, [Node("a", 4)])


def test_workers_do_not_straddle_nodes(tiny: Tiny) -> None:
    nodes = [Node("a", 3), Node("b", 3)]
    assert capacity(nodes, 2, 0) == 2
    assert make(scaled(tiny, num_workers=4), nodes).cpus == 1


@pytest.mark.parametrize(
    ("gpus", "each", "fit"), [(2, 0.5, 4), (2, 2 / 3, 2), (1, 1 / 3, 3), (0.5, 0.25, 2), (4, 2, 2)]
)
def test_a_fraction_lies_within_one_gpu(gpus: float, each: float, fit: int) -> None:
    assert capacity([Node("a", 64.0, gpus)], 1, each) == fit


def test_eight_fractions_fill_two_cores() -> None:
    assert capacity([Node("a", 2.0)], 0.25, 0) == 8
    assert capacity([Node("a", 1.0)], 0.1, 0) == 10


def test_gpus(tiny: Tiny) -> None:
    nodes = [Node("a", 8, 4), Node("b", 8, 4)]
    assert make(scaled(tiny, num_workers=8), nodes) == Placement(8, True, 2, 1)
    assert make(scaled(tiny, num_workers=8), [Node("a", 8, 4)]) == Placement(8, False, 1), "auto: not enough of them"
    assert make(scaled(tiny, num_workers=8, gpus_per_worker=0.5), [Node("a", 8, 4)]) == Placement(8, True, 1, 0.5)
    assert make(scaled(tiny), [Node("a", 8, 4)]) == Placement(0, True, None, 1.0), "in-process: one of them"
    assert make(scaled(tiny), [Node("a", 8)]) == Placement(0, False, None, 0.0)
    for config in (scaled(tiny, num_workers=8, use_gpu=True), scaled(tiny, num_workers=0, use_gpu=True)):
        with pytest.raises(UserError, match=r"GPU|CUDA"):
            make(config, [Node("a", 8, 0)])


def test_elastic_is_as_large_as_it_can_be_and_always_divides_the_shards(tiny: Tiny) -> None:
    config = scaled(tiny, num_workers=(1, 8))
    assert [make(config, [Node("a", n)]).workers for n in range(1, 10)] == [1, 2, 2, 4, 4, 4, 4, 8, 8]
    assert [plan.workers for plan in choices(config, [Node("a", 5)])] == [4, 2, 1]
    with pytest.raises(UserError, match="2 workers of 1 CPU"):
        make(scaled(tiny, num_workers=(2, 8)), [Node("a", 1)])


@pytest.mark.parametrize(
    ("plan", "threads"),
    [
        (Placement(0, False, None), 2),  # 16 cores for 8 shards
        (Placement(2, False, 8), 2),
        (Placement(8, False, 1), 1),
        (Placement(8, False, 16), 16),  # eight machines
        (Placement(4, False, 0.5), 1),
        (Placement(0, True, None), None),
        (Placement(8, True, 2, 1), None),
    ],
)
def test_threads_of_a_shard_are_decided_from_the_cores_of_all_workers(
    tiny: Tiny, plan: Placement, threads: int | None
) -> None:
    assert with_threads(tiny(shards=8), plan, 16).threads_per_shard == threads
    assert with_threads(tiny(shards=8, threads_per_shard=3), plan, 16).threads_per_shard == 3
