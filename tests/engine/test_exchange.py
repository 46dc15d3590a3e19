"""The threaded exchange: whatever arrives when, in buckets of any size, the sum has the bits of the fixed tree.

Workers are threads whose messages lie in a post office until it hands one of them over, in an order that hypothesis
draws. The tree is computed independently, in numpy.
"""

from __future__ import annotations

import itertools
import queue
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from rayexp.engine import order
from rayexp.engine.exchange import Assembly, Exchange, ExchangePlan
from rayexp.engine.gradients import GradientBuffer, ParameterLayout
from rayexp.engine.group import WorkerGroup
from rayexp.engine.reduction import Forest

CPU = torch.device("cpu")
UNIT = 8  # every number of workers divides the parts of a buffer
PATIENCE = 30.0


def tree(leaves: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32[shards, n] -> [n]: neighbours are added level by level, one without a neighbour moves up."""
    level = list(leaves)
    while len(level) > 1:
        pairs = [level[i] + level[i + 1] for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(level) - len(level) % 2 :]
    return level[0]


class LostError(RuntimeError):
    """A peer is gone."""


class PostOffice:
    """Delivers letters between workers one at a time, whichever it likes; a letter waits for its receiver's buffer."""

    def __init__(self, seed: int) -> None:
        self.luck = random.Random(seed)
        self.news = threading.Condition()
        self.sent: dict[tuple[int, int, int], Tensor] = {}
        self.wanted: dict[tuple[int, int, int], Tensor] = {}
        self.delivered: set[tuple[int, int, int]] = set()
        self.closed = self.broken = False
        self.thread = threading.Thread(target=self._deliver, daemon=True)
        self.thread.start()

    def _deliver(self) -> None:
        with self.news:
            while not self.closed:
                ready = sorted(self.sent.keys() & self.wanted.keys() - self.delivered)
                # Now and then it waits for more letters, so that late ones overtake.
                if not ready or (len(ready) < 4 and self.luck.random() < 0.5 and self.news.wait(0.001)):
                    self.news.wait(0.005)
                    continue
                letter = self.luck.choice(ready)
                self.wanted[letter].copy_(self.sent[letter])
                self.delivered.add(letter)
                self.news.notify_all()

    def close(self) -> None:
        with self.news:
            self.closed = True
            self.news.notify_all()
        self.thread.join()


@dataclass(frozen=True)
class Letters:
    """Several letters under way; the sender's buffer must stay as it is until they have arrived, as with gloo."""

    office: PostOffice
    keys: Sequence[tuple[int, int, int]]

    def wait(self) -> None:
        with self.office.news:
            done = self.office.news.wait_for(
                lambda: self.office.broken or self.office.delivered.issuperset(self.keys), PATIENCE
            )
            if self.office.broken:
                raise LostError("connection closed by peer")
            assert done, "a letter never came"


class Worker(WorkerGroup):
    """A worker of a group of threads, whose rows go from worker to worker as gloo's do."""

    direct = True

    def __init__(self, rank: int, world: int, office: PostOffice) -> None:
        super().__init__(rank, world)
        object.__setattr__(self, "office", office)

    def staged(self, tensor: Tensor) -> bool:
        return False

    def _swap(self, kind: int, sent: Sequence[Tensor], received: Tensor) -> Any:
        office: PostOffice = self.office  # type: ignore[attr-defined]
        number = self._calls[kind] * 2 + kind
        self._calls[kind] += 1
        keys = []
        with office.news:
            for peer in set(range(self.world)) - {self.rank}:
                office.sent[self.rank, peer, number] = sent[peer]
                office.wanted[peer, self.rank, number] = received[peer]
                keys += [(self.rank, peer, number), (peer, self.rank, number)]
            office.news.notify_all()
        return Letters(office, keys)


def side_by_side(world: int, seed: int, work: Callable[[WorkerGroup], Any]) -> list[Any]:
    """What each of the workers returns, or the exception that it ends with."""
    office = PostOffice(seed)
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = work(Worker(rank, world, office))
        except BaseException as error:
            results[rank] = error
            with office.news:
                office.broken = True
                office.news.notify_all()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a worker hangs"
    office.close()
    return results


def rows(seed: int, shards: int, length: int) -> NDArray[np.float32]:
    luck = np.random.default_rng(seed)
    scale = 10.0 ** luck.integers(-6, 7, (shards, length))
    return (luck.standard_normal((shards, length)) * scale).astype(np.float32)


def same_bits(found: Tensor, expected: NDArray[np.float32]) -> bool:
    return np.array_equal(found.numpy().view(np.int32), expected.view(np.int32))


WORLDS = st.sampled_from([1, 2, 4, 8])


@settings(deadline=None, max_examples=25)
@given(
    WORLDS,
    st.sampled_from([1, 2, 3]),
    st.integers(1, 12),
    st.integers(1, 100),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_any_order_of_arrival_gives_the_trees_bits(
    world: int, each: int, parts: int, bucket: int, steps: int, seed: int
) -> None:
    """Several steps over one exchange, whose boxes are used again; workers with up to three shards each."""
    shards, length = world * each, UNIT * parts
    leaves = [rows(seed + step, shards, length) for step in range(steps)]

    def work(group: WorkerGroup) -> list[Tensor]:
        exchange = Exchange(group, shards, length, CPU, bucket=bucket)
        results = []
        for step in range(steps):
            forest = Forest[Tensor](shards, lambda left, right: left.add_(right))
            for shard in order.share(shards, world, group.rank):
                forest.push((0, shard), torch.from_numpy(leaves[step][shard].copy()))
            mine = [row for _, row in forest.nodes()]
            for number in reversed(range(len(exchange.buckets))):
                exchange.send(number, [row[exchange.buckets[number]] for row in mine])
            exchange.finish()
            results.append(mine[0])
        return results

    for results in side_by_side(world, seed, work):
        assert not isinstance(results, BaseException), results
        for step, root in enumerate(results):
            assert same_bits(root, tree(leaves[step]))


class Steps:
    """Stands for the plan of a model (ExchangePlan): parameters that lie one after another, and where they lie."""

    def __init__(self, sizes: Sequence[int], buckets: Sequence[slice], leaving: Sequence[int]) -> None:
        edges = np.cumsum([0, *sizes])
        self.of = [
            [b for b, where in enumerate(buckets) if where.start < stop and start < where.stop]
            for start, stop in itertools.pairwise(edges)
        ]
        self.waits = [sum(bucket in of for of in self.of) for bucket in range(len(buckets))]
        self.order = list(leaving)


@settings(deadline=None, max_examples=25)
@given(WORLDS, st.integers(1, 3), st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 60), st.data())
def test_replicas_that_pass_parameters_in_any_order(
    world: int, replicas: int, parameters: list[int], bucket: int, data: st.DataObject
) -> None:
    shards = world * replicas
    sizes = [UNIT * size for size in parameters]
    leaves = rows(data.draw(st.integers(0, 10**6)), shards, sum(sizes))
    leaving = data.draw(st.randoms(use_true_random=False))
    passing = [[data.draw(st.permutations(range(len(sizes)))) for _ in range(replicas)] for _ in range(world)]
    seed = data.draw(st.integers(0, 10**6))
    order_of_buckets: list[list[int]] = []

    def work(group: WorkerGroup) -> Tensor:
        exchange = Exchange(group, shards, sum(sizes), CPU, bucket=bucket)
        if not order_of_buckets:
            order_of_buckets.append(leaving.sample(range(len(exchange.buckets)), len(exchange.buckets)))
        assembly = Assembly(
            Steps(sizes, exchange.buckets, order_of_buckets[0]), exchange, replicas, (), _one_by_one(replicas)
        )  # type: ignore[arg-type]

        def replica(number: int) -> None:
            shard = order.share(shards, world, group.rank).start + number
            assembly.held[number] = [((0, shard), _Held(torch.from_numpy(leaves[shard].copy())))]  # type: ignore[list-item]
            for parameter in passing[group.rank][number]:
                assembly.gradient_ready(number, parameter)
            assembly.pass_ended(number)

        threads = [threading.Thread(target=replica, args=(number,)) for number in range(replicas)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return assembly.finish()

    for result in side_by_side(world, seed, work):
        assert not isinstance(result, BaseException), result
        assert same_bits(result, tree(leaves))


@dataclass(frozen=True)
class _Held:
    """Stands for a GradientBuffer."""

    tensor: Tensor


def _one_by_one(replicas: int) -> Callable[[Callable[[int], object]], object]:
    return lambda work: [work(replica) for replica in range(replicas)]


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 6), st.integers(0, 10**6), st.data())
def test_an_error_in_one_worker_ends_all(world: int, buckets: int, seed: int, data: st.DataObject) -> None:
    """One worker fails before some bucket leaves: it says its error, all others that they lost it; none hangs."""
    length = UNIT * buckets
    guilty, at = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, buckets - 1))
    leaves = rows(seed, world, length)

    def work(group: WorkerGroup) -> Tensor:
        exchange = Exchange(group, world, length, CPU, bucket=UNIT)
        mine = torch.from_numpy(leaves[group.rank].copy())
        for number, where in enumerate(exchange.buckets):
            if group.rank == guilty and number == at:
                raise ZeroDivisionError("in the backward pass")
            exchange.send(number, [mine[where]])
        exchange.finish()
        return mine

    results = side_by_side(world, seed, work)
    assert isinstance(results[guilty], ZeroDivisionError)
    for rank in set(range(world)) - {guilty}:
        assert isinstance(results[rank], LostError)


@pytest.mark.parametrize("method", ["scatter", "collect"])
def test_an_error_in_a_background_thread_comes_to_finish(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    leaves = rows(0, 2, UNIT)
    true = getattr(Worker, method)

    def failing(self: Worker, *args: Any) -> Any:
        if self.rank == 1:
            raise LostError(method)
        return true(self, *args)

    monkeypatch.setattr(Worker, method, failing)
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()

    def work(group: WorkerGroup) -> None:
        exchange = Exchange(group, 2, UNIT, CPU)
        exchange.send(0, [torch.from_numpy(leaves[group.rank].copy())])
        try:
            exchange.finish()
        finally:
            ends.put(group.rank)

    results = side_by_side(2, 0, work)
    assert [type(result) for result in results] == [LostError, LostError]
    assert str(results[1]) == method
    assert ends.get() == 1


def test_the_order_of_addition_shows_in_the_bits() -> None:
    """So the tests above can fail."""
    leaves = rows(1, 8, 100)
    assert not np.array_equal(tree(leaves), np.add.reduce(leaves))
    assert not np.array_equal(tree(leaves), tree(np.roll(leaves, 1, 0)))


def test_the_plan_of_a_model() -> None:
    """Buckets of 32 elements over the head, the first layer's weight and bias, and the last layer's weight."""
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2, bias=False))
    layout = ParameterLayout(model, 1)
    assert (layout.head_size, [(slot.start, slot.size) for slot in layout.params]) == (
        16,
        [(0, 64), (64, 16), (80, 32)],
    )
    exchange = Exchange(WorkerGroup(), 1, layout.buffer_size, CPU, bucket=32)
    plan = ExchangePlan(layout, exchange)
    assert exchange.buckets == [slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 128)]
    assert plan.of == [[0, 1, 2], [2], [3]]
    assert plan.waits == [2, 1, 2, 1]
    assert plan.order == [3, 1, 2, 0]  # backwards through the model, and last what is known only after the pass


def test_a_bucket_leaves_as_soon_as_all_replicas_have_its_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2, bias=False))
    layout = ParameterLayout(model, 2)
    sent: list[int] = []

    class Sending(Exchange):
        def send(self, bucket: int, parts: Sequence[Tensor]) -> None:
            sent.append(bucket)

    exchange = Sending(Worker(0, 2, PostOffice(0)), 4, layout.buffer_size, CPU, bucket=32)
    plan = ExchangePlan(layout, exchange)
    assembly = Assembly(plan, exchange, 2, (), _one_by_one(2))
    for replica in (0, 1):
        assembly.held[replica] = [((0, replica), GradientBuffer(layout, CPU))]
    seen = []
    for parameter in (2, 0, 1):
        for replica in (0, 1):
            assembly.gradient_ready(replica, parameter)
            seen.append(list(sent))
    assert (plan.of, plan.order) == ([[1, 2], [3], [4]], [4, 3, 1, 2, 0])
    assert seen == [[], [4], [4], [4], [4], [4, 3, 1, 2]]  # 1 and 2 are ready before 3, but leave after it
    for replica in (0, 1):
        assembly.pass_ended(replica)
    assert sent == plan.order
