"""The exact reduction: one fixed binary tree over shard indices, whoever computed the shards.

Node (level k, index j) of the tree is the sum of shards [j 2^k, (j+1) 2^k), left child plus right child; a node whose
right child lies beyond the last shard is its left child. The tree depends on the number of shards alone. Whoever
computes consecutive shards (a replica, a worker) adds up the nodes that lie wholly within them, its *forest*; the rest
is added after the exchange. Since IEEE addition commutes and every node is one fixed addition of two fixed operands,
the root has the same bits for any number of replicas and workers. NaN and infinities pass through like any number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")

Node = tuple[int, int]
"""(level, index): the sum of shards [index 2^level, (index + 1) 2^level)."""


def parent(node: Node) -> Node:
    """The node above this one."""
    return node[0] + 1, node[1] // 2


def sibling(node: Node) -> Node:
    """The other child of this node's parent."""
    return node[0], node[1] ^ 1


def exists(node: Node, shards: int) -> bool:
    """Whether any shard lies below the node."""
    return node[1] << node[0] < shards


class Forest(Generic[T]):
    """Values of the tree's nodes; two siblings are merged as soon as both are known.

    Attributes:
        shards: number of leaves of the tree.
        add: `add(left, right)` adds in place into one of the two and returns that one.
        free: called with every value that is no longer needed.
    """

    def __init__(self, shards: int, add: Callable[[T, T], T], free: Callable[[T], object] = lambda _: None) -> None:
        self.shards, self.add, self.free = shards, add, free
        self._values: dict[Node, T] = {}

    def push(self, node: Node, value: T) -> None:
        """Add a node's value, and merge it with its siblings as far up as possible."""
        while 1 << node[0] < self.shards:
            other = sibling(node)
            if exists(other, self.shards):
                if other not in self._values:
                    break
                found = self._values.pop(other)
                left, right = (value, found) if node < other else (found, value)
                value = self.add(left, right)
                self.free(right if value is left else left)
            node = parent(node)
        self._values[node] = value

    def nodes(self) -> list[tuple[Node, T]]:
        """The nodes that are not merged yet and their values, in the order of their shards."""
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


def total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of the parts of consecutive shards, in tree order. Overwrites parts: each must be a tensor of its own."""
    held: list[tuple[int, Tensor]] = []
    for part in parts:
        level = 0
        while held and held[-1][0] == level:
            part = held.pop()[1].add_(part)
            level += 1
        held.append((level, part))
    _, root = held.pop()
    while held:
        root = held.pop()[1].add_(root)
    return root


def forest_nodes(shards: Iterable[int], total: int) -> list[Node]:
    """The nodes of the forest over these shards of `total`, in order."""
    forest = Forest[None](total, lambda left, right: None)
    for shard in shards:
        forest.push((0, shard), None)
    return [node for node, _ in forest.nodes()]
