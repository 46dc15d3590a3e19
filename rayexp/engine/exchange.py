"""The exchange between workers that completes the tree of engine/reduction.py.

A gradient buffer is cut into buckets, and every worker owns 1/W of each bucket. The workers send each owner its part of
their forests (all-to-all), the owner adds in tree order, and the sums are gathered (all-gather). Each way 2 (W-1)/W of
a buffer travels, the bandwidth-optimal volume (Patarasuk and Yuan 2009), where the shards of a worker form one node of
the tree (W is a power of two).

A bucket is sent as soon as the last backward pass of every replica has completed its gradients (`Assembly`), so that
the exchange overlaps the backward pass. All workers must send buckets in one order; the layout fixes it
(`ExchangePlan`).
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
from rayexp.engine.settings import set_threads

T = TypeVar("T")

BUCKET = 1 << 20  # elements, 4 MiB


class Exchange:
    """Adds the forests of all workers, bucket by bucket, in tree order. What it receives into is allocated once.

    Attributes:
        group: the workers.
        shards: leaves of the tree; `group.world` divides it.
        buckets: slices of a gradient buffer, in elements; each size is a multiple of `group.world`.
        nodes: the nodes of each worker's forest, by rank, in the order of the shards.
        width: nodes in the largest of these forests; all workers send as many.
        staged: whether data travels through host memory.

    Args:
        length: elements of a gradient buffer; divisible by `group.world`.
        device: where gradient buffers live.
        bucket: approximate elements of a bucket.
        without: parts of the buffer that are in no bucket (`Assembly` sends the touched rows of them).
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
        # If the receiver waits already, gloo writes to the socket in the thread that sends, which would make a late
        # worker later still. So one thread sends, and another adds what has arrived. NCCL needs all workers to scatter
        # and collect in the same order; with it, the additions wait for `finish`.
        self._sender = Background(self._scatter) if group.direct else None
        self._adder = Background(self._add) if group.direct else None

    def send(self, bucket: int, parts: Sequence[Tensor]) -> None:
        """Send a bucket of this worker's forest; returns at once. All workers must send in the same order.

        Args:
            bucket: index into `buckets`, or a number of its own from len(buckets) on for what is in no bucket.
            parts: fp32[size of the bucket] for each node of this worker's forest, in the order of `Forest.nodes`. After
                `finish` the first of them holds the root.
        """
        if self.group.world == 1:
            return
        size = parts[0].numel()
        inbox = self._box("in", bucket, self.group.world * self.width * size // self.group.world)
        out = parts[0]
        if self.width > 1 or self.staged:
            out = self._box("out", bucket, inbox.numel())
            by_owner = out.view(self.group.world, self.width, -1)
            for i, part in enumerate(parts):
                by_owner[:, i].copy_(part.view(self.group.world, -1))
        self._sent += 1
        if self._sender is not None:
            self._sender.put((bucket, parts[0], out, inbox))
        else:
            self._scatter(bucket, parts[0], out, inbox)

    def finish(self) -> None:
        """Wait until every bucket that was sent holds the root of the tree: the same bits on every worker.

        Raises:
            RuntimeError: another worker is gone.
        """
        gathered = [self._next() for _ in range(self._sent)]
        self._sent = 0
        for part, whole, done in gathered:
            done.wait()
            if whole is not part:
                part.copy_(whole)

    def _scatter(self, bucket: int, part: Tensor, out: Tensor, inbox: Tensor) -> None:
        each = bucket, part, out, self.group.scatter(out, inbox)
        if self._adder is not None:
            self._adder.put(each)
        else:
            self._under_way.append(each)

    def _next(self) -> tuple[Tensor, Tensor, Any]:
        """The next bucket that was sent: where its sum belongs, where it is gathered, and the gathering under way."""
        if self._sender is None or self._adder is None:
            return self._add(*self._under_way.pop(0))
        self._sender.result()  # raises what went wrong in sending; otherwise the adder has the bucket
        return self._adder.result()

    def _add(self, bucket: int, part: Tensor, out: Tensor, sent: Any) -> tuple[Tensor, Tensor, Any]:
        """Add the part of a bucket that this worker owns in tree order, and begin to gather the whole."""
        sent.wait()
        came, mine = (t.view(self.group.world, self.width, -1) for t in (self._boxes["in", bucket], out))
        # Where one operand is this worker's own, add into it: the sum belongs there. Addition commutes, to the bit.
        own = mine[self.group.rank].data_ptr()
        inside = range(own, own + mine[self.group.rank].nbytes)
        tree = Forest[Tensor](self.shards, lambda a, b: b.add_(a) if b.data_ptr() in inside else a.add_(b))
        for rank, nodes in enumerate(self.nodes):
            for i, node in enumerate(nodes):
                tree.push(node, (mine if rank == self.group.rank else came)[rank, i])
        whole = self._box("whole", bucket, part.numel()) if self.staged else part
        return part, whole, self.group.collect(tree.root(), whole)

    def _box(self, name: str, bucket: int, size: int) -> Tensor:
        held = self._boxes.get((name, bucket))
        if held is None or held.numel() != size:
            self._boxes[name, bucket] = torch.zeros(size, device=self._device, pin_memory=self.staged)
        return self._boxes[name, bucket]


class Background(Generic[T]):
    """Calls a function in a thread of its own, in the order of `put`; results come back in the same order."""

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = function
        self._work: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="exchange", daemon=True).start()

    def put(self, arguments: tuple[Any, ...]) -> None:
        """Queue a call with these arguments."""
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
    """The ordinary sum over workers, bucket by bucket, in the order in which the backend adds (`reduction: ddp`).

    Attributes:
        group: the workers.
        shards: leaves of the tree by which a worker adds up its replicas' gradient buffers; there is none over workers.
        buckets: slices of a gradient buffer, in elements.
    """

    def __init__(
        self,
        group: WorkerGroup,
        length: int,
        shards: int = 1,
        bucket: int = BUCKET,
        without: Sequence[Touched] = (),
    ) -> None:
        self.group, self.shards = group, shards
        self.buckets = cut(length, bucket, group.world, without)
        self._sent: list[Callable[[], object]] = []

    def send(self, bucket: int, parts: Sequence[Tensor]) -> None:
        """Start the sum of a bucket; returns at once. All workers must send in the same order."""
        if self.group.world > 1:
            self._sent.append(self.group.sum(parts[0]))

    def finish(self) -> None:
        """Wait until every bucket holds the sum."""
        for wait in self._sent:
            wait()
        self._sent.clear()


def cut(length: int, bucket: int, unit: int, without: Sequence[Touched] = ()) -> list[slice]:
    """Cut a buffer into slices.

    Args:
        length: elements of the buffer; a multiple of `unit`.
        bucket: approximate elements of a slice.
        unit: the size of every slice is a multiple of this, which divides the edges of `without`.
        without: parts that no slice contains, in the order of the buffer.
    """
    found: list[slice] = []
    starts, stops = [0, *(t.stop for t in without)], [*(t.start for t in without), length]
    for start, stop in zip(starts, stops, strict=True):
        count = max(1, round((stop - start) / bucket))
        edges = [start + (stop - start) // unit * i // count * unit for i in range(count + 1)]
        found += [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]
    return found


class ExchangePlan:
    """Which buckets a parameter's gradient lies in, and the order in which buckets are sent.

    Attributes:
        of: for each slot of `ParameterLayout.params`, the indices of the buckets that its gradient lies in.
        waits: for each bucket, how many events complete it: the gradient of each parameter in it, and the end of the
            pass where the head of the gradient buffer reaches into it.
        order: indices of all buckets, in the order in which they are sent.
    """

    def __init__(self, layout: ParameterLayout, exchange: Exchange | AllReduce) -> None:
        def overlapping(start: int, stop: int) -> list[int]:
            return [i for i, b in enumerate(exchange.buckets) if b.start < stop and start < b.stop]

        starts = [layout.head_size + slot.start for slot in layout.params]
        self.of = [overlapping(start, start + slot.size) for start, slot in zip(starts, layout.params, strict=True)]
        self.waits = [0] * len(exchange.buckets)
        for buckets in self.of:
            for bucket in buckets:
                self.waits[bucket] += 1
        # Batch statistics, loss and counts are complete only at the end of a pass.
        for bucket in overlapping(0, layout.head_size):
            self.waits[bucket] += 1
        # The backward pass reaches the last module first; a bucket is ready when the earliest module in it is.
        earliest = [len(layout.params)] * len(exchange.buckets)
        for slot, buckets in zip(layout.params, self.of, strict=True):
            for bucket in buckets:
                earliest[bucket] = min(earliest[bucket], slot.rank)
        for bucket in overlapping(0, layout.head_size):
            earliest[bucket] = -1
        self.order = sorted(range(len(exchange.buckets)), key=lambda b: (-earliest[b], b))


class Assembly:
    """Adds up one step's buckets over replicas, and sends each bucket when all replicas have completed it.

    Attributes:
        plan: which buckets a gradient lies in, and the order of sending.
        exchange: what adds up over workers.
        touched: the parameters of which only the touched rows are sent.
        each: calls a function with the number of each replica, side by side (`Runtime.each`).
        waits: for each replica and each bucket, how many events are still missing (see `ExchangePlan.waits`).
        held: for each replica, the nodes of its forest and their gradient buffers, in the order of the shards. The
            replica fills it in before its last pass.

    Args:
        replicas: number of replicas.
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

    def gradient_ready(self, replica: int, parameter: int) -> None:
        """The replica's last pass has completed the gradient of a parameter (an index into the layout's `params`)."""
        waits = self.waits[replica]
        for bucket in self.plan.of[parameter]:
            waits[bucket] -= 1
        self._merge(replica, [bucket for bucket in self.plan.of[parameter] if waits[bucket] == 0])

    def pass_ended(self, replica: int) -> None:
        """The replica's last pass has ended."""
        self._merge(replica, [bucket for bucket in self.plan.order if bucket not in self._own[replica]])

    def _merge(self, replica: int, buckets: Sequence[int]) -> None:
        for bucket in buckets:
            where = self.exchange.buckets[bucket]
            own = self._tree((node, buffer.tensor[where]) for node, buffer in self.held[replica])
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
        """The values of the forest of all replicas."""
        return [value for _, value in self._tree(pair for own in self._own for pair in own[bucket])]

    def _tree(self, values: Iterable[tuple[Node, Tensor]]) -> list[tuple[Node, Tensor]]:
        forest = Forest[Tensor](self.exchange.shards, lambda left, right: left.add_(right))
        for node, value in values:
            forest.push(node, value)
        return forest.nodes()

    def finish(self) -> Tensor:
        """The root of the tree, fp32[R], the same bits on every worker: in the first buffer that was held."""
        root = self.held[0][0][1].tensor
        replicas, buckets = len(self.held), len(self.exchange.buckets)
        if self.exchange.group.world == 1 and replicas > 1:
            # Nothing is sent, so no replica had to wait for the others before: now they share what is left to add.
            self.each(lambda replica: [self._across(b) for b in range(replica, buckets, replicas)])
        packed = [self._pack(i, part) for i, part in enumerate(self.touched)]
        self.exchange.finish()
        for part, rows in zip(self.touched, packed, strict=True):
            part.matrix(root)[part.rows] = rows[: part.rows.numel() * part.shape[1]].view(-1, part.shape[1])
        return root

    def _pack(self, number: int, part: Touched) -> Tensor:
        """Send the touched rows of a parameter; returns where their sum will be, fp32[rows * width + padding]."""
        unit, count = self.exchange.group.world, part.rows.numel() * part.shape[1]
        leaves = []
        for node, buffer in itertools.chain.from_iterable(self.held):
            packed = torch.zeros(-(-count // unit) * unit, device=buffer.tensor.device)
            rows = packed[:count].view(-1, part.shape[1])
            torch.index_select(part.matrix(buffer.tensor), 0, part.rows, out=rows)
            leaves.append((node, packed))
        values = [value for _, value in self._tree(leaves)]
        self.exchange.send(len(self.exchange.buckets) + number, values)
        return values[0]
