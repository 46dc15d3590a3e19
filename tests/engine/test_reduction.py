"""The tree: the same bits for any number of holders, against a recursive reference."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayexp.config import ExperimentConfig
from rayexp.engine import order, runtime
from rayexp.engine.exchange import Assembly, Background, Exchange, cut
from rayexp.engine.gradients import Touched
from rayexp.engine.group import WorkerGroup
from rayexp.engine.reduction import Forest, forest_nodes
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.workloads import open_workload

CPU = torch.device("cpu")


def reference(leaves: list[Tensor]) -> Tensor:
    """The tree by its definition: split at the largest power of two below the number of leaves."""
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << ((len(leaves) - 1).bit_length() - 1)
    return reference(leaves[:half]) + reference(leaves[half:])


def add(left: Tensor, right: Tensor) -> Tensor:
    return left.add_(right)


class Postbox(WorkerGroup):
    """A group of threads, with the same two exchanges as torch.distributed."""

    direct = False

    def __init__(
        self, rank: int, world: int, shared: dict[tuple[str, int], Tensor], barrier: threading.Barrier
    ) -> None:
        super().__init__(rank, world)
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "meet", barrier)

    def staged(self, tensor: Tensor) -> bool:
        return False

    def wait(self) -> None:
        """The handle of an exchange that is done already."""

    def scatter(self, rows: Tensor, out: Tensor) -> WorkerGroup:
        self._all("scatter", rows)
        for w in range(self.world):
            out.view(self.world, -1)[w] = self.shared["scatter", w].view(self.world, -1)[self.rank]
        self.meet.wait()
        return self

    def collect(self, part: Tensor, out: Tensor) -> WorkerGroup:
        self._all("collect", part)
        for w in range(self.world):
            out.view(self.world, -1)[w] = self.shared["collect", w]
        self.meet.wait()
        return self

    def _all(self, name: str, tensor: Tensor) -> None:
        self.shared[name, self.rank] = tensor.clone()
        self.meet.wait()


def on_all(world: int, work: Callable[[WorkerGroup], Tensor]) -> list[Tensor]:
    shared: dict[tuple[str, int], Tensor] = {}
    barrier = threading.Barrier(world, timeout=20)
    results: list[Tensor] = [torch.empty(0)] * world

    def worker(rank: int) -> None:
        results[rank] = work(Postbox(rank, world, shared, barrier))

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def reduce_with(world: int, leaves: list[Tensor]) -> list[Tensor]:
    shards, length = len(leaves), len(leaves[0])

    def work(group: WorkerGroup) -> Tensor:
        forest = Forest[Tensor](shards, add)
        for shard in order.share(shards, world, group.rank):
            forest.push((0, shard), leaves[shard].clone())
        rows = [row for _, row in forest.nodes()]
        exchange = Exchange(group, shards, length, CPU, bucket=shards)
        for bucket, where in enumerate(exchange.buckets):
            exchange.send(bucket, [row[where] for row in rows])
        exchange.finish()
        return rows[0]

    return on_all(world, work)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def random_leaves(shards: int, seed: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 7, (shards, length), generator=generator)
    return list(torch.randn(shards, length, generator=generator) * scale)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 24), st.integers(0, 10**6), st.data())
def test_any_number_of_workers_gives_the_bits_of_the_reference(shards: int, seed: int, data: st.DataObject) -> None:
    world = data.draw(st.sampled_from([w for w in range(1, shards + 1) if shards % w == 0]))
    leaves = random_leaves(shards, seed, 2 * shards)
    expected = reference(leaves)
    for result in reduce_with(world, leaves):
        assert same_bits(result, expected)


def test_the_order_matters_so_the_test_above_can_fail() -> None:
    leaves = random_leaves(8, 1, 1000)
    in_rank_order = leaves[0].clone()
    for leaf in leaves[1:]:
        in_rank_order += leaf
    assert not same_bits(in_rank_order, reference(leaves))


@settings(deadline=None)
@given(st.permutations(range(8)))
def test_the_order_of_pushing_does_not_matter(pushed: list[int]) -> None:
    leaves = random_leaves(8, 5, 64)
    forest = Forest[Tensor](8, add)
    for shard in pushed:
        forest.push((0, shard), leaves[shard].clone())
    assert same_bits(forest.root(), reference(leaves))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_nan_and_infinity_pass_through(world: int) -> None:
    leaves = random_leaves(8, 3, 16)
    leaves[5][0] = math.nan
    leaves[2][1] = math.inf
    leaves[2][2], leaves[7][2] = math.inf, -math.inf
    for result in reduce_with(world, leaves):
        assert torch.isnan(result[[0, 2]]).all()
        assert result[1] == math.inf
        assert torch.isfinite(result[3:]).all()


@settings(deadline=None)
@given(st.integers(1, 64))
def test_no_more_rows_than_the_depth_of_the_tree(shards: int) -> None:
    held = most = 0
    forest = Forest[None](shards, lambda left, right: None)
    for shard in range(shards):
        forest.push((0, shard), None)
        held = len(forest.nodes())
        most = max(most, held)
    assert held == 1
    assert most <= shards.bit_length()


@pytest.mark.parametrize("pushed", [0, 4, 7])
def test_a_missing_shard_is_noticed(pushed: int) -> None:
    forest = Forest[None](8, lambda left, right: None)
    for shard in range(pushed):
        forest.push((0, shard), None)
    with pytest.raises(RuntimeError, match="not complete"):
        forest.root()


@settings(deadline=None)
@given(st.integers(1, 12), st.data())
def test_left_comes_before_right_and_nothing_is_lost(shards: int, data: st.DataObject) -> None:
    """With words for values: added in order whatever the order of pushing, and nodes lie in the order of the shards."""
    pushed = data.draw(st.permutations(range(shards)))
    part = data.draw(st.integers(0, shards))
    forest = Forest[str](shards, lambda left, right: left + right)
    for shard in pushed[:part]:
        forest.push((0, shard), f"{shard:x}")
    assert "".join(value for _, value in forest.nodes()) == "".join(f"{shard:x}" for shard in sorted(pushed[:part]))
    for shard in pushed[part:]:
        forest.push((0, shard), f"{shard:x}")
    assert forest.root() == "".join(f"{shard:x}" for shard in range(shards))


def test_what_was_added_is_freed_and_the_sum_is_kept() -> None:
    """Whichever of the two the sum was written into."""
    for into_left in (True, False):
        freed: list[list[int]] = []

        def into(left: list[int], right: list[int], into_left: bool = into_left) -> list[int]:
            kept, gone = (left, right) if into_left else (right, left)
            kept[:] = [left[0] + right[0]]
            gone[:] = [-1]
            return kept

        forest = Forest[list[int]](4, into, freed.append)
        for shard in (2, 0, 3, 1):
            forest.push((0, shard), [1 << shard])
        assert forest.root() == [15]
        assert freed == [[-1]] * 3


def test_power_of_two_shares_are_single_nodes() -> None:
    for world in (1, 2, 4, 8):
        for rank in range(world):
            assert len(forest_nodes(order.share(8, world, rank), 8)) == 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_touched_rows_are_added_over_all_workers_too(world: int) -> None:
    """An embedding of 6 rows between other parameters, of which the batch reads three."""
    leaves = random_leaves(4, 3, 64)
    part = Touched(1, 16, 48, (6, 5), torch.tensor([0, 3, 4]))
    for leaf in leaves:
        touched = part.matrix(leaf)[part.rows].clone()
        leaf[part.start : part.stop] = 0
        part.matrix(leaf)[part.rows] = touched

    def work(group: WorkerGroup) -> Tensor:
        exchange = Exchange(group, 4, 64, CPU, bucket=16, without=[part])
        buckets = range(len(exchange.buckets))
        plan: Any = SimpleNamespace(of=[], waits=[0 for _ in buckets], order=list(buckets))
        assembly = Assembly(plan, exchange, 1, [part], lambda work: [work(0)])
        shards = order.share(4, world, group.rank)
        rows: Any = [((0, shard), SimpleNamespace(tensor=leaves[shard].clone())) for shard in shards]
        assembly.held[0] = rows
        assembly.pass_ended(0)
        return assembly.finish()

    for result in on_all(world, work):
        assert same_bits(result, reference([leaf.clone() for leaf in leaves]))


def test_what_goes_wrong_in_the_background_is_raised_in_its_turn() -> None:
    threads = torch.get_num_threads()
    background = Background(lambda divisor: 6 // divisor)
    for divisor in (2, 0, 3):
        background.put((divisor,))
    assert background.result() == 3
    with pytest.raises(ZeroDivisionError):
        background.result()
    assert background.result() == 2
    assert torch.get_num_threads() == threads


def test_buckets_cover_a_row_and_leave_out_what_they_must() -> None:
    without = [Touched(0, 64, 128, (3, 20), torch.arange(2)), Touched(1, 640, 704, (64, 1), torch.arange(2))]
    for unit in (1, 2, 4, 8):
        buckets = cut(1024, 100, unit, without)
        covered = [i for b in buckets for i in range(b.start, b.stop)]
        assert covered == [i for i in range(1024) if not (64 <= i < 128 or 640 <= i < 704)]
        assert all((b.stop - b.start) % unit == 0 for b in buckets)


@pytest.mark.parametrize(("shards", "root"), [(1, (0, 0)), (2, (1, 0)), (5, (3, 0)), (8, (3, 0))])
def test_the_root_is_the_first_node_that_covers_all_shards(shards: int, root: tuple[int, int]) -> None:
    assert forest_nodes(range(shards), shards) == [root]


# ---------------------------------------------------------------------- whole steps


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_with_static_steps_have_the_bits_of_one(small: Callable[..., ExperimentConfig], workers: int) -> None:
    """As on GPUs: passes, then the exchange, then the update. Over an epoch, whose last batch is a short one."""
    config, opening = small(cpu_kernels=False, lr=0.01), threading.Lock()

    def train(group: WorkerGroup, static: bool = True) -> Tensor:
        here = runtime.configure(config, torch.device("cpu"), config.shards // group.world, 1, static)
        with opening:  # torchvision draws initial weights from the global generator
            one = Trainer(config, open_workload(config), group, here)
        losses: list[Any] = []
        for event in one.train():
            if isinstance(event, StepDone):
                losses.append(event.loss)
                if event.step == event.steps:
                    break
        assert len(losses) == one.steps
        return torch.cat([one.master.params, one.master.stats, torch.tensor(losses)])

    alone = train(WorkerGroup(), static=False)
    assert torch.equal(train(WorkerGroup()), alone)
    for found in on_all(workers, train):
        assert torch.equal(found, alone)
