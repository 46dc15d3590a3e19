"""The exact reduction: one fixed binary tree over shard indices, whoever computed the shards.

Node (level k, index j) of the tree is the sum of shards [j 2^k, (j+1) 2^k), left child plus right child; a node whose
right child lies beyond the last shard is its left child. The tree depends on the number of shards alone. Every holder
of a run of shards (a lane, a worker) adds up the nodes that lie wholly within its run, its *forest*; what remains is
added after the exchange. Since IEEE addition commutes and every node is one fixed addition of two fixed operands, the
root has the same bits for any number of lanes and workers. NaN and infinities pass through like any number.

Exchange: every worker owns 1/W of the row. Workers send each owner its part of their forests (all-to-all), the owner
adds in tree order, and the parts are gathered: 2 (W-1)/W of a row travels each way, the bandwidth-optimal volume
(Patarasuk and Yuan 2009), when the shards of a worker form one node (any power of two).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from rayexp.engine.group import Group

T = TypeVar("T")

Node = tuple[int, int]
"""(level, index)"""


def parent(node: Node) -> Node:
    """The node above."""
    return node[0] + 1, node[1] // 2


def sibling(node: Node) -> Node:
    """The other child of the node above."""
    return node[0], node[1] ^ 1


def exists(node: Node, shards: int) -> bool:
    """Whether any shard lies below the node."""
    return node[1] << node[0] < shards


class Forest(Generic[T]):
    """Values of the tree's nodes, merged as soon as two siblings are there.

    Args:
        shards: number of leaves of the tree.
        add: `add(left, right)` adds in place into `left`.
        free: is called with every value that is no longer needed.
    """

    def __init__(
        self, shards: int, add: Callable[[T, T], object], free: Callable[[T], object] = lambda _: None
    ) -> None:
        self.shards, self.add, self.free = shards, add, free
        self._values: dict[Node, T] = {}

    def push(self, node: Node, value: T) -> None:
        """Add a node's value, and merge upwards as far as it goes."""
        while 1 << node[0] < self.shards:
            other = sibling(node)
            if exists(other, self.shards):
                if other not in self._values:
                    break
                found = self._values.pop(other)
                left, right = (value, found) if node < other else (found, value)
                self.add(left, right)
                self.free(right)
                value = left
            node = parent(node)
        self._values[node] = value

    def nodes(self) -> list[tuple[Node, T]]:
        """What remains, in the order of the shards below."""
        return sorted(self._values.items(), key=lambda item: item[0][1] << item[0][0])

    def root(self) -> T:
        """The sum over all shards.

        Raises:
            RuntimeError: shards are missing.
        """
        nodes = self.nodes()
        if len(nodes) != 1 or 1 << nodes[0][0][0] < self.shards:
            raise RuntimeError(f"the tree over {self.shards} shards is not complete: {[n for n, _ in nodes]}")
        return nodes[0][1]


def forest_nodes(shards: Iterable[int], total: int) -> list[Node]:
    """The nodes that remain when these shards of `total` have been pushed, in order."""
    forest = Forest[None](total, lambda left, right: None)
    for shard in shards:
        forest.push((0, shard), None)
    return [node for node, _ in forest.nodes()]


class Exchange:
    """Adds the forests of all workers, in tree order. Buffers are made once.

    Args:
        group: the workers.
        shards: leaves of the tree; `group.world` divides it.
        length: elements of a row; divisible by `group.world`.
        device: where rows live.
    """

    def __init__(self, group: Group, shards: int, length: int, device: torch.device) -> None:
        self.group, self.shards = group, shards
        if group.world == 1:
            return
        per = shards // group.world
        self.nodes = [forest_nodes(range(r * per, (r + 1) * per), shards) for r in range(group.world)]
        self.part = length // group.world
        # Every worker sends as many nodes as the largest forest has, so that all parts are equal.
        self.width = max(len(nodes) for nodes in self.nodes)
        self.staged = group.staged(torch.empty(0, device=device))
        place = torch.device("cpu") if self.staged else device
        self.inbox = torch.empty(group.world, self.width, self.part, device=place)
        self.outbox = torch.zeros_like(self.inbox) if self.width > 1 or self.staged else None
        self.whole = torch.empty(group.world * self.part) if self.staged else None

    def __call__(self, rows: Sequence[Tensor]) -> None:
        """Leave the root of the tree, the same bits on every worker, in the first of these rows.

        Args:
            rows: the values of this worker's forest, in the order of `Forest.nodes`.
        """
        if self.group.world == 1:
            return
        if self.outbox is None:
            self.group.scatter(rows[0], self.inbox.view(-1))
        else:
            for i, row in enumerate(rows):
                self.outbox[:, i].copy_(row.view(self.group.world, self.part))
            self.group.scatter(self.outbox.view(-1), self.inbox.view(-1))
        tree = Forest[Tensor](self.shards, lambda left, right: left.add_(right))
        for rank, nodes in enumerate(self.nodes):
            for i, node in enumerate(nodes):
                tree.push(node, self.inbox[rank, i])
        if self.whole is None:
            self.group.collect(tree.root(), rows[0])
        else:
            self.group.collect(tree.root(), self.whole)
            rows[0].copy_(self.whole)
