"""One optimizer step: shards on lanes, the tree, the exchange, the update.

`exact` runs each shard as its own forward and backward with shapes that never change, and adds in tree order.
`ddp` runs all of a worker's shards in one batched pass and adds by ordinary all-reduce.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rayexp.config import ExperimentConfig
from rayexp.engine import order
from rayexp.engine.draws import Draws, adopt
from rayexp.engine.flat import Master, Replica, Row
from rayexp.engine.group import Group
from rayexp.engine.norm import per_shard
from rayexp.engine.optimize import Optimizer
from rayexp.engine.place import Place
from rayexp.engine.reduce import Exchange, Forest
from rayexp.engine.workload import Carry, Workload


@dataclass(frozen=True, slots=True)
class Wish:
    """What a worker wants after this step: to end the run, or to save its state. All learn of it with the gradient."""

    stop: bool = False
    save: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step says: loss SUM and count over the global batch, what any worker wished, seconds by phase."""

    loss: float
    count: int
    wish: Wish
    seconds: dict[str, float]


@dataclass
class _Seconds:
    data: float = 0.0
    transfer: float = 0.0


class Lane:
    """One lane of a worker: a replica of the model for training, and rows for its part of the tree."""

    def __init__(self, master: Master, batch_dim: int, batched: bool, compiled: bool) -> None:
        self.master = master
        self.draws = Draws()
        self.replica = Replica(master)
        adopt(self.replica.model, self.draws, batch_dim)
        if batched:
            per_shard(self.replica.model, self.draws)
        self.forward: nn.Module = torch.compile(self.replica.model) if compiled else self.replica.model  # type: ignore[assignment]
        self._keeping: list[Any] = [m for m in self.replica.model.modules() if hasattr(m, "begin_step")]
        self._spare: list[Row] = []

    def begin_step(self) -> None:
        """The weights have changed: modules that keep something made from them (`begin_step`) drop it."""
        for module in self._keeping:
            module.begin_step()

    def take(self) -> Row:
        """A zeroed row, and the replica writes into it."""
        row = self._spare.pop() if self._spare else Row(self.master.layout, self.master.device)
        row.tensor.zero_()
        self.replica.bind(row)
        return row

    def give(self, row: Row) -> None:
        """Take back a row that is no longer needed."""
        self._spare.append(row)

    @property
    def spares(self) -> int:
        """Rows that wait to be used again."""
        return len(self._spare)


class Stepper:
    """Computes this worker's part of every step, and updates the master with the sum over all workers."""

    def __init__(
        self,
        config: ExperimentConfig,
        workload: Workload,
        master: Master,
        optimizer: Optimizer,
        group: Group,
        place: Place,
    ) -> None:
        self.config, self.workload, self.master, self.optimizer = config, workload, master, optimizer
        self.group, self.place = group, place
        self.exact = config.reduction == "exact"
        self.shards = order.share(config.shards, group.world, group.rank)
        self.lanes = [
            Lane(master, workload.batch_dim, not self.exact, config.compile and place.device.type == "cuda")
            for _ in range(place.lanes)
        ]
        self.carries: dict[int, Carry] = {}
        self.exchange = Exchange(group, config.shards, master.layout.row, place.device)

    def __call__(self, epoch: int, step: int, global_step: int, lr: float, wish: Wish) -> StepResult:
        """Run one step.

        Args:
            epoch, step: which batch (see engine/workload.py).
            global_step: optimizer steps done before this one.
            lr: the learning rate.
            wish: this worker's.
        """
        clock = [time.perf_counter()]
        if step == 0:
            self.carries = {}
        seconds = _Seconds()
        row = (self._exact if self.exact else self._ddp)(epoch, step, wish, seconds, clock)
        self.place.synchronize()
        clock.append(time.perf_counter())
        loss, count, shards, stops, saves = self.master.layout.tail(row).tolist()
        self.optimizer.update(self.master.layout.gradient(row), count, lr, global_step + 1, self.place)
        self.master.update_stats(row, shards)
        self.place.synchronize()
        clock.append(time.perf_counter())
        spans = [b - a for a, b in itertools.pairwise(clock)]
        phases = {
            "data": seconds.data,
            "transfer": seconds.transfer,
            "compute": spans[0] - seconds.data - seconds.transfer,
            "reduce": spans[1],
            "optimizer": spans[2],
        }
        return StepResult(loss, int(count), Wish(stops > 0, saves > 0), phases)

    # ------------------------------------------------------------------ exact

    def _exact(self, epoch: int, step: int, wish: Wish, seconds: _Seconds, clock: list[float]) -> Tensor:
        parts = [order.share(len(self.shards), self.place.lanes, i) for i in range(self.place.lanes)]
        forests = [Forest[Row](self.config.shards, _add, lane.give) for lane in self.lanes]

        def work(lane: Lane, forest: Forest[Row], part: range) -> _Seconds:
            spent = _Seconds()
            lane.begin_step()
            shards = range(self.shards.start + part.start, self.shards.start + part.stop)
            at = shards.start
            while at < shards.stop:
                row = self._pass(lane, epoch, step, range(at, at + 1), wish, spent)
                node = (0, at)
                if self.workload.returns_gradients and at % 2 == 0 and at + 1 < shards.stop:
                    # Autograd's accumulation is the tree's addition: the right sibling goes into the left one's row.
                    self._pass(lane, epoch, step, range(at + 1, at + 2), wish, spent, onto=row)
                    node = (1, at // 2)
                forest.push(node, row)
                at = node[1] + 1 << node[0]
            return spent

        tasks = [lambda a=a: work(*a) for a in zip(self.lanes, forests, parts, strict=True)]
        for spent in self.place.run(tasks):
            seconds.data += spent.data / self.place.lanes
            seconds.transfer += spent.transfer / self.place.lanes
        self.place.synchronize()
        clock.append(time.perf_counter())
        whole = Forest[Row](self.config.shards, _add, self._recycle)
        for forest in forests:
            for node, row in forest.nodes():
                whole.push(node, row)
        rows = [row for _, row in whole.nodes()]
        self.exchange([row.tensor for row in rows])
        for row in rows:
            self._recycle(row)
        return rows[0].tensor

    def _recycle(self, row: Row) -> None:
        min(self.lanes, key=lambda lane: lane.spares).give(row)

    # ------------------------------------------------------------------ ddp

    def _ddp(self, epoch: int, step: int, wish: Wish, seconds: _Seconds, clock: list[float]) -> Tensor:
        self.lanes[0].begin_step()
        row = self._pass(self.lanes[0], epoch, step, self.shards, wish, seconds)
        self.place.synchronize()
        clock.append(time.perf_counter())
        self.group.sum(row.tensor)
        self._recycle(row)
        return row.tensor

    # ------------------------------------------------------------------ one forward and backward

    def _pass(
        self,
        lane: Lane,
        epoch: int,
        step: int,
        shards: range,
        wish: Wish,
        seconds: _Seconds,
        onto: Row | None = None,
    ) -> Row:
        """The sum over these shards, in a fresh row or added to `onto`."""
        start = time.perf_counter()
        batch = self.workload.batch(epoch, step, shards, self.place.device)
        seconds.data += time.perf_counter() - start
        keys = [order.key(self.config.seed, "dropout", epoch, step, shard) for shard in shards]
        lane.draws.begin(keys, batch.sizes, self.place.device)
        carry = self._carry(shards, batch.sizes)
        row = onto or lane.take()
        layout = self.master.layout
        rest = layout.rest(row.tensor)
        before = rest.clone()
        rest.zero_()
        with self.autocast():
            loss, after = self.workload.loss(lane.forward, batch, carry)
        loss.backward()  # type: ignore[no-untyped-call]
        self._keep(shards, batch.sizes, after)
        tail = layout.tail(row.tensor)
        tail.copy_(torch.tensor([0.0, batch.count, len(shards), wish.stop, wish.save]))
        tail[0].copy_(loss.detach())
        if onto is not None:
            torch.add(before, rest, out=rest)
        return row

    def autocast(self) -> AbstractContextManager[object]:
        """The precision that the configuration asks for, in this thread."""
        if self.config.precision == "bf16":
            # The cache of cast weights is one for all threads: a lane that ends empties it under the others, and a
            # weight that is then cast twice rounds its gradient twice.
            return torch.autocast(self.place.device.type, torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def _carry(self, shards: range, sizes: Sequence[int]) -> Carry:
        for shard, size in zip(shards, sizes, strict=True):
            if shard not in self.carries:
                self.carries[shard] = self.workload.carry(size, self.place.device)
        found = [self.carries[shard] for shard in shards]
        if len(found) == 1:
            return found[0]
        return {name: torch.cat([c[name] for c in found], self.workload.batch_dim) for name in found[0]}

    def _keep(self, shards: range, sizes: Sequence[int], after: Carry) -> None:
        if len(shards) == 1:
            self.carries[shards[0]] = after
            return
        dim = self.workload.batch_dim
        parts = {name: torch.split(tensor, list(sizes), dim) for name, tensor in after.items()}
        for i, shard in enumerate(shards):
            self.carries[shard] = {name: part[i].contiguous() for name, part in parts.items()}


def _add(left: Row, right: Row) -> None:
    left.tensor.add_(right.tensor)
