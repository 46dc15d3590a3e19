"""A lane: what one thread of a worker (or its GPU) needs to compute shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rayexp.engine.gradients import GradientBuffer, Master, ReplicaModel, Touched
from rayexp.engine.rng import Draws, adopt
from rayexp.engine.runtime import Runtime
from rayexp.engine.workload import Workload


class Replica:
    """One lane of a worker: a replica of the model for training, and rows for its part of the tree.

    Args:
        keep_apart: what keeps the shards of a pass apart in the replica; None: nothing need.
        compiled: whether the forward goes through torch.compile.
    """

    def __init__(
        self,
        master: Master,
        workload: Workload,
        keep_apart: Callable[[nn.Module, Draws], None] | None,
        compiled: bool = False,
    ) -> None:
        self.master, self.shares = master, workload.shares_buffer
        self.draws = Draws()
        self.model = ReplicaModel(master)
        adopt(self.model.module, self.draws, workload.batch_dim)
        if keep_apart is not None:
            keep_apart(self.model.module, self.draws)
        self.forward: nn.Module = torch.compile(self.model.module, dynamic=False) if compiled else self.model.module  # type: ignore[assignment]
        self.keeping: list[Any] = [m for m in self.model.module.modules() if hasattr(m, "begin_step")]
        self.passed: Callable[[int], None] | None = None
        self.model.watch(lambda parameter: self.passed(parameter) if self.passed else None)
        self._spare: list[GradientBuffer] = []

    def take(self, touched: Sequence[Touched]) -> GradientBuffer:
        """A row for the next pass, and the replica writes into it. Its gradients need not be zeroed where shards may
        share a row, but for parts that are written only where `touched` says so."""
        row = self._spare.pop() if self._spare else GradientBuffer(self.master.layout, self.master.device)
        if self.shares:
            row.clear(touched)
        else:
            row.tensor.zero_()
        self.model.bind(row, {part.parameter for part in touched} if self.shares else None)
        return row

    def give(self, row: GradientBuffer) -> None:
        """Take back a row that is no longer needed."""
        self._spare.append(row)

    @property
    def spares(self) -> int:
        """Rows that wait to be used again."""
        return len(self._spare)


def begin_step(replicas: Sequence[Replica], runtime: Runtime) -> None:
    """The weights have changed: modules that keep something made from them make it anew.

    Such a module has `begin_step()` and leaves what it made in `kept`, which its twins on the other lanes share.
    """
    twins = list(zip(*(replica.keeping for replica in replicas), strict=True))

    def work(number: int) -> None:
        for first, *others in twins[number :: len(replicas)]:
            first.begin_step()
            for other in others:
                other.kept = first.kept

    if twins:
        runtime.each(work)
