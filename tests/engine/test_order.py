from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rayexp.engine import order


@given(st.integers(0, 2**62), st.integers(1, 50), st.integers(1, 2000))
def test_permutation_is_one_and_differs_between_epochs(seed: int, epoch: int, n: int) -> None:
    first = order.permutation(seed, epoch, n)
    assert sorted(first.tolist()) == list(range(n))
    assert np.array_equal(first, order.permutation(seed, epoch, n))
    if n > 20:
        assert not np.array_equal(first, order.permutation(seed, epoch + 1, n))


@given(st.integers(1, 12), st.integers(1, 20), st.integers(2, 500), st.data())
def test_every_sample_once_an_epoch_for_any_number_of_workers(
    shards: int, per_shard: int, n: int, data: st.DataObject
) -> None:
    cut = order.Cut(max(n, 2 * shards), shards * per_shard, shards)
    workers = data.draw(st.sampled_from([w for w in range(1, shards + 1) if shards % w == 0]))
    seen: list[int] = []
    for step in range(cut.steps):
        batch: list[int] = []
        for rank in range(workers):
            mine = order.share(shards, workers, rank)
            together = list(cut.positions(step, mine))
            one_by_one = [p for s in mine for p in cut.positions(step, range(s, s + 1))]
            assert together == one_by_one
            assert sum(cut.sizes(step, mine)) == len(together)
            batch += together
        assert batch == list(cut.batch(step))
        seen += batch
    assert seen == list(range(cut.n))


@given(st.integers(1, 12), st.integers(2, 20), st.integers(2, 500))
def test_no_shard_is_left_with_a_single_sample(shards: int, per_shard: int, n: int) -> None:
    cut = order.Cut(max(n, 2 * shards), shards * per_shard, shards)
    for step in range(cut.steps):
        assert min(cut.sizes(step, range(shards))) >= 2


@given(st.integers(0, 100), st.integers(1, 20))
def test_shares_are_consecutive_and_complete(count: int, parts: int) -> None:
    shares = [order.share(count, parts, p) for p in range(parts)]
    assert [i for s in shares for i in s] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=50, unique=True))
def test_draws_belong_to_the_sample_not_to_its_place(samples: list[int]) -> None:
    ids = np.array(samples)
    together = order.uniform(7, ids, 5)
    assert ((together >= 0) & (together < 1)).all()
    alone = np.concatenate([order.uniform(7, ids[i : i + 1], 5) for i in range(len(ids))])
    assert np.array_equal(together, alone)
    assert not np.array_equal(together, order.uniform(8, ids, 5))


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=50), st.integers(1, 30))
@example(0, [0], 1)
@example(2**63 - 1, [2**40, 2**40], 23)
def test_a_device_draws_the_same_bits(key: int, samples: list[int], draws: int) -> None:
    ids = np.array(samples)
    drawn = order.uniform_on(torch.tensor(key), torch.from_numpy(ids), draws)
    assert drawn.dtype == torch.float64
    assert np.array_equal(drawn.numpy(), order.uniform(key, ids, draws))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50))
def test_a_device_mixes_the_same_bits(words: list[int]) -> None:
    """Any 64 bits, those with the highest one set too."""
    values = np.array(words, np.uint64)
    mixed = order.mix_on(torch.from_numpy(values.view(np.int64)))
    assert np.array_equal(mixed.numpy().view(np.uint64), order.mix(values))


def test_draws_are_uniform_and_uncorrelated() -> None:
    u = order.uniform(order.key(0, "augment", 1), np.arange(50_000), 4)
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(u.var() - 1 / 12) < 0.002
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.02


def test_the_numbers_are_pinned() -> None:
    """A run can be resumed by another version only while these stay."""
    assert order.key(0, "init") == 3912388711783151084
    assert order.permutation(3, 2, 8).tolist() == [5, 2, 0, 4, 3, 7, 1, 6]
    assert order.uniform(5, np.arange(2), 2).tolist() == [
        [0.8131936563894288, 0.6036027003889185],
        [0.796536606643734, 0.3642264806258064],
    ]


def test_mix_is_splitmix64() -> None:
    """The first outputs of splitmix64 from state 0, as in Vigna's splitmix64.c."""
    assert [hex(v) for v in order.mix(np.arange(1, 4, dtype=np.uint64))] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_a_small_rest_joins_the_batch_before_it() -> None:
    """16 samples give 8 shards two each, which batch statistics need; 15 do not."""
    assert [order.Cut(n, 32, 8).steps for n in (20, 32, 64, 79, 80, 95, 96)] == [1, 1, 2, 2, 3, 3, 3]
    assert [len(order.Cut(79, 32, 8).batch(step)) for step in (0, 1)] == [32, 47]
