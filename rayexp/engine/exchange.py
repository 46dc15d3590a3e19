"""The exchange between workers that completes the tree of engine/reduce.py.

A row is cut into buckets. In each bucket every worker owns 1/W: workers send each owner its part of their forests
(all-to-all), the owner adds in tree order, and the parts are gathered. 2 (W-1)/W of a row travels each way, the
bandwidth-optimal volume (Patarasuk and Yuan 2009), where the shards of a worker form one node (any power of two).

A bucket leaves as soon as the last backward pass of every lane has left it behind (`Assembly`), so that the exchange
overlaps the backward; buckets leave in one order, which the layout fixes, since all workers must send alike.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from rayexp.engine.gradients import GradientBuffer, ParameterLayout, Touched
from rayexp.engine.group import WorkerGroup
from rayexp.engine.reduction import Forest, Node, forest_nodes
from rayexp.engine.runtime import set_threads

T = TypeVar("T")

BUCKET = 1 << 20  # elements, 4 MiB


class Exchange:
    """Adds the forests of all workers, bucket by bucket, in tree order. Buffers are made once.

    Args:
        group: the workers.
        shards: leaves of the tree; `group.world` divides it.
        length: elements of a row; divisible by `group.world`.
        device: where rows live.
        bucket: elements of a bucket, about.
        without: parts of the row that are in no bucket (`Assembly` sends what is touched of them).
    """

    def __init__(
        self,
        group: WorkerGroup,
        shards: int,
        length: int,
        device: torch.device,
        bucket: int = BUCKET,
        without: Sequence[Touched] = (),
    ) -> None:
        self.group, self.shards = group, shards
        self.buckets = cut(length, bucket, group.world, without)
        per = shards // group.world
        self.nodes = [forest_nodes(range(r * per, (r + 1) * per), shards) for r in range(group.world)]
        # Every worker sends as many nodes as the largest forest has, so that all parts are equal.
        self.width = max(len(nodes) for nodes in self.nodes)
        self.staged = group.world > 1 and group.staged(torch.empty(0, device=device))
        self._device = torch.device("cpu") if self.staged else device
        self._boxes: dict[tuple[str, int], Tensor] = {}
        self._under_way: list[tuple[int, Tensor, Tensor, Any]] = []
        self._sent = 0
        # gloo writes to the socket in the thread that sends if the other side waits already, which would make a worker
        # that is late later still: so a thread sends, and another adds what has come. NCCL would have all workers
        # scatter and collect in one order; there, the adding waits for `finish`.
        self._sender = Background(self._scatter) if group.direct else None
        self._adder = Background(self._add) if group.direct else None

    def send(self, bucket: int, rows: Sequence[Tensor]) -> None:
        """Send a bucket of this worker's forest; returns at once. All workers must send in the same order.

        Args:
            bucket: index into `buckets`.
            rows: that slice of the values of this worker's forest, in the order of `Forest.nodes`. The first of them
                will hold the root.
        """
        if self.group.world == 1:
            return
        size = rows[0].numel()
        inbox = self._box("in", bucket, self.group.world * self.width * size // self.group.world)
        out = rows[0]
        if self.width > 1 or self.staged:
            out = self._box("out", bucket, inbox.numel())
            parts = out.view(self.group.world, self.width, -1)
            for i, row in enumerate(rows):
                parts[:, i].copy_(row.view(self.group.world, -1))
        self._sent += 1
        if self._sender is not None:
            self._sender.put((bucket, rows[0], out, inbox))
        else:
            self._scatter(bucket, rows[0], out, inbox)

    def finish(self) -> None:
        """Wait until every bucket that was sent holds the root of the tree: the same bits on every worker.

        Raises:
            RuntimeError: another worker is gone.
        """
        gathered = [self._next() for _ in range(self._sent)]
        self._sent = 0
        for row, whole, done in gathered:
            done.wait()
            if whole is not row:
                row.copy_(whole)

    def _scatter(self, bucket: int, row: Tensor, out: Tensor, inbox: Tensor) -> None:
        each = bucket, row, out, self.group.scatter(out, inbox)
        if self._adder is not None:
            self._adder.put(each)
        else:
            self._under_way.append(each)

    def _next(self) -> tuple[Tensor, Tensor, Any]:
        """The next bucket's row, where its whole will be, and the gathering under way."""
        if self._sender is None or self._adder is None:
            return self._add(*self._under_way.pop(0))
        self._sender.result()  # raises what went wrong there; else the adder has it
        return self._adder.result()

    def _add(self, bucket: int, row: Tensor, out: Tensor, sent: Any) -> tuple[Tensor, Tensor, Any]:
        """Add this worker's part of a bucket in tree order, and begin to gather the whole."""
        sent.wait()
        came, mine = (t.view(self.group.world, self.width, -1) for t in (self._boxes["in", bucket], out))
        # Into this worker's own part where it takes part: there the sum belongs. Addition commutes, to the bit.
        own = mine[self.group.rank].data_ptr()
        inside = range(own, own + mine[self.group.rank].nbytes)
        tree = Forest[Tensor](self.shards, lambda a, b: b.add_(a) if b.data_ptr() in inside else a.add_(b))
        for rank, nodes in enumerate(self.nodes):
            for i, node in enumerate(nodes):
                tree.push(node, (mine if rank == self.group.rank else came)[rank, i])
        whole = self._box("whole", bucket, row.numel()) if self.staged else row
        return row, whole, self.group.collect(tree.root(), whole)

    def _box(self, name: str, bucket: int, size: int) -> Tensor:
        held = self._boxes.get((name, bucket))
        if held is None or held.numel() != size:
            self._boxes[name, bucket] = torch.zeros(size, device=self._device, pin_memory=self.staged)
        return self._boxes[name, bucket]


class Background(Generic[T]):
    """Calls a function with what is put, in order, in a thread of its own; results come back in the same order."""

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = function
        self._work: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="exchange", daemon=True).start()

    def put(self, arguments: tuple[Any, ...]) -> None:
        """Call the function with these, some time."""
        self._work.put(arguments)

    def result(self) -> T:
        """The next result; raises what the function raised."""
        done = self._done.get()
        if isinstance(done, BaseException):
            raise done
        return done

    def _run(self) -> None:
        set_threads(1)
        while True:
            try:
                self._done.put(self._function(*self._work.get()))
            except BaseException as error:
                self._done.put(error)


class AllReduce:
    """The ordinary sum over workers, bucket by bucket, in whatever order the backend adds: `reduction: ddp`."""

    shards = 1  # one row a worker, no tree

    def __init__(self, group: WorkerGroup, length: int, bucket: int = BUCKET, without: Sequence[Touched] = ()) -> None:
        self.group = group
        self.buckets = cut(length, bucket, group.world, without)
        self._sent: list[Callable[[], object]] = []

    def send(self, bucket: int, rows: Sequence[Tensor]) -> None:
        """Start the sum of a bucket; returns at once. All workers must send in the same order."""
        if self.group.world > 1:
            self._sent.append(self.group.sum(rows[0]))

    def finish(self) -> None:
        """Wait until every bucket holds the sum."""
        for wait in self._sent:
            wait()
        self._sent.clear()


def cut(length: int, bucket: int, unit: int, without: Sequence[Touched] = ()) -> list[slice]:
    """Slices of about `bucket` elements around what is left out, each a multiple of `unit` (which divides edges)."""
    found: list[slice] = []
    starts, stops = [0, *(t.stop for t in without)], [*(t.start for t in without), length]
    for start, stop in zip(starts, stops, strict=True):
        count = max(1, round((stop - start) / bucket))
        edges = [start + (stop - start) // unit * i // count * unit for i in range(count + 1)]
        found += [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]
    return found


class ExchangePlan:
    """Which buckets a parameter's gradient lies in, and the order in which buckets leave."""

    def __init__(self, layout: ParameterLayout, exchange: Exchange | AllReduce) -> None:
        def touched(start: int, stop: int) -> list[int]:
            return [i for i, b in enumerate(exchange.buckets) if b.start < stop and start < b.stop]

        self.of = [touched(layout.head + s.start, layout.head + s.start + s.size) for s in layout.params]
        self.waits = [0] * len(exchange.buckets)
        for buckets in self.of:
            for bucket in buckets:
                self.waits[bucket] += 1
        # Statistics, loss and counts are there only when a pass has ended.
        for bucket in touched(0, layout.head):
            self.waits[bucket] += 1
        # Backward comes to the last module first; a bucket is ready when the earliest module in it is.
        earliest = [len(layout.params)] * len(exchange.buckets)
        for slot, buckets in zip(layout.params, self.of, strict=True):
            for bucket in buckets:
                earliest[bucket] = min(earliest[bucket], slot.rank)
        for bucket in touched(0, layout.head):
            earliest[bucket] = -1
        self.order = sorted(range(len(exchange.buckets)), key=lambda b: (-earliest[b], b))


class Assembly:
    """One step's buckets: each lane adds up what it holds of a bucket when it is past it; when all lanes are, the
    bucket leaves.

    Args:
        lanes: how many lanes fill `held`, each with its part of the tree in order.
        touched: parts of the row of which only these rows are sent.
        each: calls a function with every replica's number, side by side (`Runtime.each`).
    """

    def __init__(
        self,
        plan: ExchangePlan,
        exchange: Exchange | AllReduce,
        replicas: int,
        touched: Sequence[Touched],
        each: Callable[[Callable[[int], object]], object],
    ) -> None:
        self.plan, self.exchange, self.touched, self.each = plan, exchange, touched, each
        self.waits = [list(plan.waits) for _ in range(replicas)]
        self.held: list[list[tuple[Node, GradientBuffer]]] = [[] for _ in range(replicas)]
        self._own: list[dict[int, list[tuple[Node, Tensor]]]] = [{} for _ in range(replicas)]
        self._next = 0
        self._lock = threading.Lock()

    def passed(self, replica: int, parameter: int) -> None:
        """The lane's last pass has completed a parameter's gradient."""
        waits = self.waits[replica]
        for bucket in self.plan.of[parameter]:
            waits[bucket] -= 1
        self._merge(replica, [bucket for bucket in self.plan.of[parameter] if waits[bucket] == 0])

    def ended(self, replica: int) -> None:
        """The lane's last pass has ended."""
        self._merge(replica, [bucket for bucket in self.plan.order if bucket not in self._own[replica]])

    def _merge(self, replica: int, buckets: Sequence[int]) -> None:
        for bucket in buckets:
            where = self.exchange.buckets[bucket]
            own = self._tree((node, row.tensor[where]) for node, row in self.held[replica])
            with self._lock:
                self._own[replica][bucket] = own
        if self.exchange.group.world > 1:
            with self._lock:
                self._send()

    def _send(self) -> None:
        while self._next < len(self.plan.order):
            bucket = self.plan.order[self._next]
            if any(bucket not in own for own in self._own):
                return
            self._next += 1
            self.exchange.send(bucket, self._across(bucket))

    def _across(self, bucket: int) -> list[Tensor]:
        """The forest of all lanes."""
        return [value for _, value in self._tree(pair for own in self._own for pair in own[bucket])]

    def _tree(self, values: Iterable[tuple[Node, Tensor]]) -> list[tuple[Node, Tensor]]:
        forest = Forest[Tensor](self.exchange.shards, lambda left, right: left.add_(right))
        for node, value in values:
            forest.push(node, value)
        return forest.nodes()

    def finish(self) -> Tensor:
        """The root of the tree, the same bits on every worker: in the first row that was held."""
        root = self.held[0][0][1].tensor
        replicas, buckets = len(self.held), len(self.exchange.buckets)
        if self.exchange.group.world == 1 and replicas > 1:
            # Nothing leaves, so lanes need not wait for each other before: they share what is left.
            self.each(lambda replica: [self._across(b) for b in range(replica, buckets, replicas)])
        packed = [self._pack(i, part) for i, part in enumerate(self.touched)]
        self.exchange.finish()
        for part, rows in zip(self.touched, packed, strict=True):
            part.matrix(root)[part.rows] = rows[: part.rows.numel() * part.shape[1]].view(-1, part.shape[1])
        return root

    def _pack(self, number: int, part: Touched) -> Tensor:
        """Send the touched rows only; where their sum will be."""
        unit, count = self.exchange.group.world, part.rows.numel() * part.shape[1]
        leaves = []
        for node, row in itertools.chain.from_iterable(self.held):
            packed = torch.zeros(-(-count // unit) * unit, device=row.tensor.device)
            rows = packed[:count].view(-1, part.shape[1])
            torch.index_select(part.matrix(row.tensor), 0, part.rows, out=rows)
            leaves.append((node, packed))
        values = [value for _, value in self._tree(leaves)]
        self.exchange.send(len(self.exchange.buckets) + number, values)
        return values[0]
