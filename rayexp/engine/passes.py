"""The passes of a worker's replicas: which shards go through the model at once, and what a pass leaves in a gradient
buffer.

With `reduction: exact` each shard has a forward and backward of its own, whose shapes never change; where the bits stay
the same, a few shards go through the model together. With `ddp` all shards of a replica do.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from rayexp.config import ExperimentConfig
from rayexp.engine import cpu, order
from rayexp.engine.gradients import COUNT, LOSS, STOP, GradientBuffer, Master, Touched
from rayexp.engine.inputs import StepInputs
from rayexp.engine.reduction import Forest, Node, total
from rayexp.engine.replica import Replica, fixed_weights
from rayexp.engine.runtime import Runtime
from rayexp.engine.workload import Batch, RecurrentState, Workload

TOGETHER = 2
"""At most 2^TOGETHER shards go through the model together: more gain nothing, and their activations take memory."""
_IDENTITY = nn.Identity()

Held = list[tuple[Node, GradientBuffer]]
"""Nodes of the tree and the buffers with their sums, in the order of the shards."""


class Passes:
    """Computes this worker's shards.

    Attributes:
        exact: whether the reduction is `exact`.
        shards: the shards of a batch that this worker computes.
        leaves: leaves of the tree that adds up: shards, or with `ddp` this worker's replicas.
        compiled: whether torch.compile makes the kernels.
        together: whether several shards may go through the model together (see `tried`).
        replicas: this worker's replicas, as many as the runtime runs side by side.
        tried: for shards of these sizes (samples each): whether they have the same bits together as one by one.
        recurrent_states: the recurrent state that each of this worker's shards hands to the next step, in tensors that
            stay in their place.
        generators: for each shard, what its random layers draw from.
    """

    def __init__(
        self, config: ExperimentConfig, workload: Workload, master: Master, runtime: Runtime, shards: range
    ) -> None:
        self.config, self.workload, self.master, self.runtime, self.shards = config, workload, master, runtime, shards
        self.exact = config.reduction == "exact"
        on_cpu = runtime.device.type == "cpu"
        fp32 = on_cpu and config.precision == "fp32" and not runtime.static
        kernels = config.cpu_kernels
        self.together = self.exact and fp32 and workload.together and cpu.together(master.model, kernels)
        self.compiled = config.compile and not on_cpu
        apart = self.together or not self.exact
        self.replicas = [
            Replica(
                master,
                workload,
                apart=apart,
                together=self.together,
                compiled=self.compiled,
                kernels=kernels,
                plain=runtime.static,
                deterministic=self.exact and not on_cpu,
            )
            for _ in range(runtime.side_by_side)
        ]
        self.tried: dict[tuple[int, ...], bool] = {}
        self.recurrent_states: dict[int, RecurrentState] = {}
        self._keys = dict.fromkeys(shards, 0)
        self.renew_generators()

    @property
    def leaves(self) -> int:
        """See the class."""
        return self.config.shards if self.exact else len(self.replicas)

    def begin(self, epoch: int, step: int, inputs: StepInputs) -> None:
        """Begin a step: seed what random layers draw from, and at the start of an epoch reset the recurrent states."""
        if step == 0:
            for shard, size in zip(inputs.shards, inputs.sizes, strict=True):
                self.keep_state(shard, self.workload.initial_state(size, self.runtime.device))
        if self.replicas[0].draws_numbers:
            self._keys = {s: order.key(self.config.seed, "dropout", epoch, step, s) for s in self.shards}
            self.seed(self.shards)

    def seed(self, shards: range) -> None:
        """Let these shards draw the present step's numbers, once more if they have drawn them already."""
        for shard in shards:
            self.generators[shard].manual_seed(self._keys[shard])

    def renew_generators(self) -> None:
        """Take new generators for the present step, since those that took part in a failed capture are of no use."""
        self.generators = {shard: torch.Generator(self.runtime.device) for shard in self.shards}
        self.seed(self.shards)

    def models(self) -> dict[str, nn.Module]:
        """The replicas' modules, by what a message calls them."""
        return {f"model[{i}]" if i else "model": each.model.module for i, each in enumerate(self.replicas)}

    def fixed_weights(self) -> AbstractContextManager[None]:
        """While this step computes: no weight changes, and replicas may keep what they compute from the weights."""
        return fixed_weights(self.replicas, self.runtime)

    def prepared(self, inputs: StepInputs) -> StepInputs:
        """The inputs with what the workload makes of them for all shards at once (see `Workload.assemble`)."""
        prepare = getattr(self.workload, "prepare", None)
        return inputs if prepare is None else inputs.with_fed(prepare(inputs.fed, inputs.sizes))

    def each(self, work: Callable[[int], float]) -> list[float]:
        """`work` with the number of each replica, side by side."""
        return self.runtime.run([functools.partial(work, number) for number in range(len(self.replicas))])

    def compute(
        self, number: int, inputs: StepInputs, touched: Sequence[Touched], last: Callable[[Held], object]
    ) -> float:
        """Compute a replica's shards.

        Args:
            number: of the replica.
            last: called before the last pass with what the replica will have added up after it.

        Returns:
            The seconds that went into making batches.
        """
        replica = self.replicas[number]
        forest = Forest[GradientBuffer](self.leaves, add, replica.give)
        runs = self._runs(number, inputs)
        seconds = 0.0
        for node, passes in runs:
            buffer = replica.take(touched)
            for shards in passes:
                if (node, shards) == (runs[-1][0], passes[-1]):
                    last([*forest.nodes(), (node, buffer)])
                seconds += self.one(replica, buffer, inputs, shards)
            if node != runs[-1][0]:
                forest.push(node, buffer)
        return seconds

    def recycle(self, buffer: GradientBuffer) -> None:
        """Take back a buffer whose content is no longer needed."""
        min(self.replicas, key=lambda replica: replica.spares).give(buffer)

    def _runs(self, replica: int, inputs: StepInputs) -> list[tuple[Node, list[range]]]:
        """The passes of a replica: nodes of the tree, and for each the shards of the passes that fill its buffer."""
        part = order.share(len(self.shards), len(self.replicas), replica)
        at, stop = self.shards.start + part.start, self.shards.start + part.stop
        if not self.exact:
            return [((0, replica), [range(at, stop)])]
        highest = TOGETHER if self.together else 1
        runs: list[tuple[Node, list[range]]] = []
        while at < stop:
            level = 0
            while level < highest and at % (2 << level) == 0 and at + (2 << level) <= stop:
                level += 1
            while level > 1 and not self._alike(self.replicas[replica], inputs, range(at, at + (1 << level))):
                level -= 1
            shards = range(at, at + (1 << level))
            if self.together and self._alike(self.replicas[replica], inputs, shards):
                runs.append(((level, at >> level), [shards]))
            elif level == 1 and self.replicas[replica].shares_buffer:
                # Accumulating into a buffer is the tree's addition: the right sibling may go into the left one's
                # buffer, which saves zeroing a second one and adding it.
                runs.append(((level, at >> level), [range(shard, shard + 1) for shard in shards]))
            else:
                runs += [((0, shard), [range(shard, shard + 1)]) for shard in shards]
            at = shards.stop
        return runs

    def _alike(self, replica: Replica, inputs: StepInputs, shards: range) -> bool:
        """Whether these shards have the same bits together as one by one. A kernel's order of additions depends on the
        sizes alone, so each combination of sizes is tried once, with the first data that has it."""
        _, sizes = inputs.of(shards)
        if len(sizes) > 1 and sizes not in self.tried:
            found = []
            for passes in ([shards], [range(shard, shard + 1) for shard in shards]):
                forest = Forest[GradientBuffer](len(passes), add)
                for i, one in enumerate(passes):
                    buffer = replica.take(())
                    self.one(replica, buffer, inputs, one)
                    forest.push((0, i), buffer)
                self.seed(shards)
                found.append(forest.root().tensor.view(torch.int32))
            self.tried[sizes] = torch.equal(*found)
        return len(sizes) == 1 or self.tried[sizes]

    # ------------------------------------------------------------------ one forward and backward

    def one(self, replica: Replica, buffer: GradientBuffer, inputs: StepInputs, shards: range) -> float:
        """Add the sum over these shards to the buffer, in one pass; returns the seconds that making the batch took."""
        start = time.perf_counter()
        fed, sizes = inputs.of(shards)
        batch = self.workload.assemble(fed, sizes)
        seconds = time.perf_counter() - start
        replica.draws.begin([self.generators[shard] for shard in shards], sizes)
        state = self._state_of(shards, sizes)
        head, before = buffer.head, None
        if not replica.plain:  # whose buffers hold one pass each
            before = head.clone()
            head.zero_()
        if self.together:
            losses, after = self._losses(replica, batch), state
        else:
            with self.autocast():
                loss, after = self.workload.loss(replica.forward, batch, state)
            losses = [loss]
        if replica.plain:
            replica.model.backward(losses[0], buffer)
        else:
            torch.autograd.backward(losses)
            replica.model.finish_pass()
        self._keep_states(shards, sizes, after)
        scalars = self.master.layout.scalars(buffer.tensor)
        scalars[LOSS].copy_(total(loss.detach() for loss in losses))
        scalars[COUNT].fill_(batch.count)
        scalars[STOP:].copy_(inputs.flags)
        if before is not None:
            torch.add(before, head, out=head)
        return seconds

    def _losses(self, replica: Replica, batch: Batch) -> list[Tensor]:
        """The loss of each shard, a scalar, when several go through the model together."""
        outputs, sizes = replica.forward(*batch.inputs), list(batch.sizes)
        losses = []
        for part, targets in zip(torch.split(outputs, sizes), torch.split(batch.targets, sizes), strict=True):
            one = Batch((part,), targets, (len(part),), len(part))
            losses.append(self.workload.loss(_IDENTITY, one, {})[0])
        return losses

    def autocast(self) -> AbstractContextManager[object]:
        """The precision that the configuration asks for, in this thread."""
        if self.config.precision == "bf16":
            # All threads share one cache of cast weights: a replica that ends empties it under the others, and a
            # weight that is then cast twice rounds its gradient twice.
            return torch.autocast(self.runtime.device.type, torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def _state_of(self, shards: range, sizes: Sequence[int]) -> RecurrentState:
        for shard, size in zip(shards, sizes, strict=True):
            if shard not in self.recurrent_states:
                self.recurrent_states[shard] = self.workload.initial_state(size, self.runtime.device)
        found = [self.recurrent_states[shard] for shard in shards]
        if len(found) == 1:
            return found[0]
        return {name: torch.cat([one[name] for one in found], self.workload.batch_dim) for name in found[0]}

    def _keep_states(self, shards: range, sizes: Sequence[int], after: RecurrentState) -> None:
        dim = self.workload.batch_dim
        parts = {name: torch.split(tensor, list(sizes), dim) for name, tensor in after.items()}
        for i, shard in enumerate(shards):
            self.keep_state(shard, {name: part[i] for name, part in parts.items()})

    def states(self) -> dict[int, RecurrentState]:
        """A copy of the recurrent states."""
        found = {shard: self.recurrent_states.get(shard, {}) for shard in self.shards}
        return {shard: {name: tensor.clone() for name, tensor in state.items()} for shard, state in found.items()}

    def keep_state(self, shard: int, state: RecurrentState) -> None:
        """Set a shard's recurrent state: in its place, where it has one."""
        if shard in self.recurrent_states:
            for name, tensor in state.items():
                self.recurrent_states[shard][name].copy_(tensor)
        else:
            self.recurrent_states[shard] = {name: tensor.contiguous() for name, tensor in state.items()}


def add(left: GradientBuffer, right: GradientBuffer) -> GradientBuffer:
    """Add the right buffer to the left one."""
    left.tensor.add_(right.tensor)
    return left
