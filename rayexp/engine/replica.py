"""A replica: the copy of the model and the gradient buffers with which one thread of a worker (or its GPU) computes
shards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from rayexp.engine import cpu
from rayexp.engine.average_pooling import add_in_order
from rayexp.engine.batch_norm import per_shard
from rayexp.engine.gradients import GradientBuffer, Master, ReplicaModel, Touched
from rayexp.engine.rng import Draws, adopt
from rayexp.engine.runtime import Runtime
from rayexp.engine.workload import Workload


class Replica:
    """One replica of a worker.

    Attributes:
        model: the copy of the model, bound to one gradient buffer at a time.
        draws: the random generators and sizes of the shards in the present pass.
        forward: what computes the outputs: the model's module, or its compiled form.
        on_gradient: called with a parameter's index as soon as a backward pass has completed its gradient; None: nobody
            is told.
        caches: parts of the module that keep values computed from the weights (see `fixed_weights`).
        draws_numbers: whether the module has random layers.

    Args:
        apart: whether the batch norms of a pass over several shards normalise each shard by itself.
        together: whether the module also keeps the gradients of the shards of a pass apart (`cpu.together`).
        compiled: whether the forward goes through torch.compile.
        kernels: the configuration's `cpu_kernels`.
        plain: whether the module computes as PyTorch does, and each pass has a gradient buffer of its own to overwrite.
        deterministic: whether operations for which CUDA has no deterministic kernel are computed by others.
    """

    def __init__(
        self,
        master: Master,
        workload: Workload,
        *,
        apart: bool,
        together: bool,
        compiled: bool,
        kernels: bool,
        plain: bool,
        deterministic: bool = False,
    ) -> None:
        self.master, self.plain = master, plain
        self.shares_buffer = workload.shares_buffer and not plain
        self.draws = Draws()
        self.model = ReplicaModel(master)
        module = self.model.module
        self.draws_numbers = adopt(module, self.draws, workload.batch_dim)
        if apart:
            per_shard(module, self.draws, compiled)
        if deterministic:
            add_in_order(module)
        self.caches = cpu.accelerate(module, self.draws, together, master.device, kernels and not plain)
        self.forward: nn.Module = torch.compile(module, dynamic=False) if compiled else module  # type: ignore[assignment]
        self.on_gradient: Callable[[int], None] | None = None
        if not plain:
            # Not of a plain module: what watches a parameter belongs to the stream that is present now, and a captured
            # backward pass on another one must not wait for that.
            self.model.watch(lambda parameter: self.on_gradient(parameter) if self.on_gradient else None)
        self._spare: list[GradientBuffer] = []

    def take(self, touched: Sequence[Touched]) -> GradientBuffer:
        """A gradient buffer for the next pass, with the model bound to it. All of it is zeroed, unless shards may share
        a buffer: then the pass overwrites the gradients, except those of which it writes the touched rows only. A plain
        pass overwrites all gradients."""
        return self.bind(self._spare.pop() if self._spare else self.new_buffer(), touched)

    def new_buffer(self) -> GradientBuffer:
        """A gradient buffer that nobody else has."""
        return GradientBuffer(self.master.layout, self.master.device)

    def bind(self, buffer: GradientBuffer, touched: Sequence[Touched]) -> GradientBuffer:
        """Prepare a buffer for the next pass as `take` does, and return it."""
        if self.plain:
            buffer.clear(())
            self.model.bind_stats(buffer)
            return buffer
        if self.shares_buffer:
            buffer.clear(touched)
        else:
            buffer.tensor.zero_()
        self.model.bind(buffer, {part.parameter for part in touched} if self.shares_buffer else None)
        return buffer

    def give(self, buffer: GradientBuffer) -> None:
        """Take back a buffer that is no longer needed."""
        self._spare.append(buffer)

    @property
    def spares(self) -> int:
        """Number of buffers that wait to be used again."""
        return len(self._spare)


@contextlib.contextmanager
def fixed_weights(replicas: Sequence[Replica], runtime: Runtime) -> Iterator[None]:
    """While no weight changes: the replicas' modules keep what they compute from the weights. Each cache computes it
    once, and its counterparts in the other replicas share the result. Outside of this block nothing is kept, so a
    module never computes with weights of before."""
    counterparts = list(zip(*(replica.caches for replica in replicas), strict=True))

    def work(number: int) -> None:
        for first, *others in counterparts[number :: len(replicas)]:
            first.begin_step()
            for other in others:
                other.kept = first.kept

    try:
        if counterparts:
            runtime.each(work)
        yield
    finally:
        for cache in (cache for replica in replicas for cache in replica.caches):
            cache.end_step()
