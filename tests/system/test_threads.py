"""Cores shared out among shards: never more threads than cores unless one shard takes more, and never no replica."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayexp.system.threads import replicas, threads_per_shard

CORES = (2, 4, 8, 16, 64)
counts = st.integers(1, 64)


@pytest.mark.parametrize(
    ("cores", "shards", "threads"),
    [(16, 8, 2), (8, 8, 1), (2, 8, 1), (64, 8, 8), (12, 8, 1), (16, 1, 16), (0.5, 8, 1), (2 * 0.5, 1, 1), (17, 8, 2)],
)
def test_threads_of_a_shard(cores: float, shards: int, threads: int) -> None:
    assert threads_per_shard(cores, shards) == threads


@pytest.mark.parametrize(
    ("cores", "threads", "shards", "found"),
    [
        (16, 2, 8, 8),
        (8, 2, 4, 4),
        (2, 1, 8, 2),
        (1, 2, 8, 1),
        (0.5, 1, 8, 1),
        (16, 2, 2, 2),
        (5, 2, 8, 2),
        (64, 8, 8, 8),
    ],
)
def test_replicas_of_a_worker(cores: float, threads: int, shards: int, found: int) -> None:
    assert replicas(cores, threads, shards) == found


@pytest.mark.parametrize("cores", CORES)
@given(shards=counts)
def test_a_run_in_one_process_keeps_its_cores_busy(cores: int, shards: int) -> None:
    threads = threads_per_shard(cores, shards)
    side_by_side = replicas(cores, threads, shards)
    assert threads >= 1
    assert 1 <= side_by_side <= shards
    assert side_by_side * threads <= cores
    # Neither another replica nor, where every shard has one, another thread for each would fit.
    assert side_by_side == shards or (side_by_side + 1) * threads > cores
    assert side_by_side < shards or shards * (threads + 1) > cores


@given(cores=st.floats(0.125, 128), threads=counts, shards=counts)
def test_no_worker_has_more_threads_than_cores_unless_one_shard_takes_more(
    cores: float, threads: int, shards: int
) -> None:
    found = replicas(cores, threads, shards)
    assert 1 <= found <= shards
    assert found * threads <= cores or found == 1


@pytest.mark.parametrize("cores", CORES)
@given(workers=counts, each=st.integers(1, 8))
def test_any_number_of_workers_on_a_machine_comes_to_the_same_threads(cores: int, workers: int, each: int) -> None:
    """So one configuration has the same bits with them, where each has an equal share of the cores."""
    shards = workers * each
    if workers <= cores:
        assert threads_per_shard(workers * (cores // workers), shards) == threads_per_shard(cores, shards)
    else:
        assert threads_per_shard(cores, shards) == 1
