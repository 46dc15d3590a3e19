"""One optimizer step: the replicas compute shards, the tree and the exchange add them up, the optimizer updates.

With `reduction: exact` each shard's gradient is computed by itself and added in tree order. Where the bits stay the
same, a few shards go through the model together; otherwise each has a forward and backward of its own, whose shapes
never change. With `ddp` all of a worker's shards go through the model in one pass, and an ordinary all-reduce adds up.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayexp.config import ExperimentConfig
from rayexp.engine import cpu, order
from rayexp.engine.contract import FirstStep, generators, moved, refuse_drawing
from rayexp.engine.exchange import AllReduce, Assembly, Exchange, ExchangePlan
from rayexp.engine.gradients import GradientBuffer, Master, ParameterLayout, Touched
from rayexp.engine.group import WorkerGroup
from rayexp.engine.optimizer import Optimizer
from rayexp.engine.reduction import Forest, Node, total
from rayexp.engine.replica import Replica, fixed_weights
from rayexp.engine.runtime import Runtime, upload
from rayexp.engine.workload import Batch, RecurrentState, Workload

TOGETHER = 2
"""At most 2^TOGETHER shards go through the model together: more gain nothing, and their activations take memory."""
_IDENTITY = nn.Identity()


@dataclass(frozen=True, slots=True)
class ControlFlags:
    """What a worker asks for after a step. It travels with the gradient, so every worker sees the same flags.

    Attributes:
        stop: end the run.
        save: save the state.
    """

    stop: bool = False
    save: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step, the same on every worker except `seconds`.

    Attributes:
        loss: sum of the loss over the global batch.
        count: number of loss terms (images or tokens) in the global batch.
        flags: what any worker asked for.
        seconds: seconds of this worker by phase: data, transfer, compute, reduce, optimizer.
    """

    loss: float
    count: int
    flags: ControlFlags
    seconds: dict[str, float]


@dataclass
class _Seconds:
    data: float = 0.0
    transfer: float = 0.0


class Stepper:
    """Computes this worker's part of every step, and updates the master with the sum over all workers.

    Attributes:
        exact: whether the reduction is `exact`.
        shards: the shards of a batch that this worker computes.
        together: whether several shards may go through the model together (see `tried`).
        replicas: this worker's replicas, as many as the runtime runs side by side.
        tried: for shards of these sizes (samples each): whether they have the same bits together as one by one.
        recurrent_states: the recurrent state that each of this worker's shards hands to the next step.
        exchange: what adds up over workers.
        plan: the order in which buckets are sent.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        workload: Workload,
        master: Master,
        optimizer: Optimizer,
        group: WorkerGroup,
        runtime: Runtime,
    ) -> None:
        self.config, self.workload, self.master, self.optimizer = config, workload, master, optimizer
        self.group, self.runtime = group, runtime
        self.exact = config.reduction == "exact"
        self.shards = order.share(config.shards, group.world, group.rank)
        on_cpu = runtime.device.type == "cpu"
        fp32 = on_cpu and config.precision == "fp32"
        kernels = config.cpu_kernels
        self.together = self.exact and fp32 and workload.together and cpu.together(master.model, kernels)
        compiled = config.compile and not on_cpu
        apart = self.together or not self.exact
        self.replicas = [
            Replica(master, workload, apart=apart, together=self.together, compiled=compiled, kernels=kernels)
            for _ in range(runtime.replicas)
        ]
        self.tried: dict[tuple[int, ...], bool] = {}
        self.recurrent_states: dict[int, RecurrentState] = {}
        self._watch_next = not compiled  # hooks would have a compiled model compiled twice
        size, without = master.layout.buffer_size, self._touched(1, 0)
        self.exchange: Exchange | AllReduce = AllReduce(group, size, without=without)
        if self.exact:
            self.exchange = Exchange(group, config.shards, size, runtime.device, without=without)
        self.plan = ExchangePlan(master.layout, self.exchange)

    def __call__(self, epoch: int, step: int, global_step: int, lr: float, flags: ControlFlags) -> StepResult:
        """Run one step.

        Args:
            epoch, step: which batch (see engine/workload.py).
            global_step: optimizer steps done before this one.
            lr: the learning rate.
            flags: what this worker asks for.
        """
        clock = [time.perf_counter()]
        if step == 0:
            self.recurrent_states = {}
        seconds = _Seconds()
        touched = self._touched(epoch, step)
        watched = self._watch()
        with fixed_weights(self.replicas, self.runtime):
            buffer = (self._exact if self.exact else self._ddp)(epoch, step, touched, flags, seconds, clock)
        if watched is not None:
            self._check_first_step(*watched, epoch, step)
        self.runtime.synchronize()
        clock.append(time.perf_counter())
        loss, count, shards, stops, saves = self.master.layout.scalars(buffer).tolist()
        self.optimizer.update(buffer, count, lr, global_step + 1, self.runtime, touched)
        self.master.update_stats(buffer, shards)
        self.runtime.synchronize()
        clock.append(time.perf_counter())
        spans = [b - a for a, b in itertools.pairwise(clock)]
        phases = {
            "data": seconds.data,
            "transfer": seconds.transfer,
            "compute": spans[0] - seconds.data - seconds.transfer,
            "reduce": spans[1],
            "optimizer": spans[2],
        }
        return StepResult(loss, int(count), ControlFlags(stops > 0, saves > 0), phases)

    @property
    def exchange_bytes(self) -> int:
        """Bytes that a worker brings to the exchange in an epoch's first step; of an embedding, the touched rows."""
        saved = sum(part.stop - part.start - len(part.rows) * part.shape[1] for part in self._touched(1, 0))
        return 4 * (self.master.layout.buffer_size - saved)

    def _touched(self, epoch: int, step: int) -> list[Touched]:
        return touched(self.workload, self.master.layout, self.runtime.device, epoch, step)

    # ------------------------------------------------------------------ the first step

    def _watch(self) -> tuple[FirstStep, list[Tensor]] | None:
        """In a process's first step, begin to watch for what a model must not do; None in every other step."""
        first, self._watch_next = self._watch_next, False
        if not first:
            return None
        known = {slot.name for slot in self.master.layout.stats}
        return FirstStep(self.replicas[0].model.module, known), generators(self.runtime.device)

    def _check_first_step(self, first: FirstStep, before: list[Tensor], epoch: int, step: int) -> None:
        """Refuse a model that does what the engine cannot reproduce (UserError)."""
        first.end()
        if self.exact and moved(before, self.runtime.device):
            replica, states = self.replicas[0], dict(self.recurrent_states)
            shards = range(self.shards.start, self.shards.start + 1)

            def run() -> None:
                # A new buffer: the step's result is in one that has been given back.
                buffer = GradientBuffer(self.master.layout, self.master.device)
                replica.model.bind(buffer, None)
                self._pass(replica, buffer, epoch, step, shards, ControlFlags(), _Seconds())

            refuse_drawing(replica.model.module, self.runtime.device, lambda: self.runtime.run([run]))
            self.recurrent_states = states

    # ------------------------------------------------------------------ exact

    def _exact(
        self, epoch: int, step: int, touched: list[Touched], flags: ControlFlags, seconds: _Seconds, clock: list[float]
    ) -> Tensor:
        assembly = Assembly(self.plan, self.exchange, len(self.replicas), touched, self.runtime.each)

        def work(number: int) -> _Seconds:
            replica, spent = self.replicas[number], _Seconds()
            forest = Forest[GradientBuffer](self.config.shards, _add, replica.give)
            runs = self._runs(number, epoch, step)
            for node, passes in runs:
                buffer = replica.take(touched)
                for shards in passes:
                    if (node, shards) == (runs[-1][0], passes[-1]):
                        assembly.held[number] = [*forest.nodes(), (node, buffer)]
                        replica.on_gradient = lambda parameter: assembly.gradient_ready(number, parameter)
                    self._pass(replica, buffer, epoch, step, shards, flags, spent)
                if node != runs[-1][0]:
                    forest.push(node, buffer)
            replica.on_gradient = None
            assembly.pass_ended(number)
            return spent

        for spent in self.runtime.each(work):
            seconds.data += spent.data / len(self.replicas)
            seconds.transfer += spent.transfer / len(self.replicas)
        self.runtime.synchronize()
        clock.append(time.perf_counter())
        root = assembly.finish()
        for held in assembly.held:
            for _, buffer in held:
                self._recycle(buffer)
        return root

    def _runs(self, replica: int, epoch: int, step: int) -> list[tuple[Node, list[range]]]:
        """The passes of a replica: nodes of the tree, and for each the shards of the passes that fill its buffer."""
        part = order.share(len(self.shards), len(self.replicas), replica)
        at, stop = self.shards.start + part.start, self.shards.start + part.stop
        highest = TOGETHER if self.together else 1
        runs: list[tuple[Node, list[range]]] = []
        while at < stop:
            level = 0
            while level < highest and at % (2 << level) == 0 and at + (2 << level) <= stop:
                level += 1
            while level > 1 and not self._alike(self.replicas[replica], epoch, step, range(at, at + (1 << level))):
                level -= 1
            shards = range(at, at + (1 << level))
            if self.together and self._alike(self.replicas[replica], epoch, step, shards):
                runs.append(((level, at >> level), [shards]))
            elif level == 1 and self.workload.shares_buffer:
                # Accumulating into a buffer is the tree's addition: the right sibling may go into the left one's
                # buffer, which saves zeroing a second one and adding it.
                runs.append(((level, at >> level), [range(shard, shard + 1) for shard in shards]))
            else:
                runs += [((0, shard), [range(shard, shard + 1)]) for shard in shards]
            at = shards.stop
        return runs

    def _alike(self, replica: Replica, epoch: int, step: int, shards: range) -> bool:
        """Whether these shards have the same bits together as one by one. A kernel's order of additions depends on the
        sizes alone, so each combination of sizes is tried once, with the first data that has it."""
        sizes = self.workload.sizes(step, shards)
        if len(sizes) > 1 and sizes not in self.tried:
            found = []
            for passes in ([shards], [range(shard, shard + 1) for shard in shards]):
                forest = Forest[GradientBuffer](len(passes), _add)
                for i, one in enumerate(passes):
                    buffer = replica.take(())
                    self._pass(replica, buffer, epoch, step, one, ControlFlags(), _Seconds())
                    forest.push((0, i), buffer)
                found.append(forest.root().tensor.view(torch.int32))
            self.tried[sizes] = torch.equal(*found)
        return len(sizes) == 1 or self.tried[sizes]

    def _recycle(self, buffer: GradientBuffer) -> None:
        min(self.replicas, key=lambda replica: replica.spares).give(buffer)

    # ------------------------------------------------------------------ ddp

    def _ddp(
        self, epoch: int, step: int, touched: list[Touched], flags: ControlFlags, seconds: _Seconds, clock: list[float]
    ) -> Tensor:
        replica = self.replicas[0]
        assembly = Assembly(self.plan, self.exchange, 1, touched, self.runtime.each)
        buffer = replica.take(touched)
        assembly.held[0] = [((0, 0), buffer)]
        replica.on_gradient = lambda parameter: assembly.gradient_ready(0, parameter)
        self.runtime.run([lambda: self._pass(replica, buffer, epoch, step, self.shards, flags, seconds)])
        replica.on_gradient = None
        assembly.pass_ended(0)
        self.runtime.synchronize()
        clock.append(time.perf_counter())
        root = assembly.finish()
        self._recycle(buffer)
        return root

    # ------------------------------------------------------------------ one forward and backward

    def _pass(
        self,
        replica: Replica,
        buffer: GradientBuffer,
        epoch: int,
        step: int,
        shards: range,
        flags: ControlFlags,
        seconds: _Seconds,
    ) -> None:
        """Add the sum over these shards to the buffer."""
        start = time.perf_counter()
        batch = self.workload.batch(epoch, step, shards, self.runtime.device)
        seconds.data += time.perf_counter() - start
        keys = [order.key(self.config.seed, "dropout", epoch, step, shard) for shard in shards]
        replica.draws.begin(keys, batch.sizes, self.runtime.device)
        state = self._state_of(shards, batch.sizes)
        head = buffer.head
        before = head.clone()
        head.zero_()
        if self.together:
            losses, after = self._losses(replica, batch), state
        else:
            with self.autocast():
                loss, after = self.workload.loss(replica.forward, batch, state)
            losses = [loss]
        torch.autograd.backward(losses)
        replica.model.finish_pass()
        self._keep_states(shards, batch.sizes, after)
        scalars = self.master.layout.scalars(buffer.tensor)
        scalars[0].copy_(total(loss.detach() for loss in losses))
        # Filled: copying a tensor of ours there would wait for a GPU.
        for i, value in enumerate((batch.count, len(shards), flags.stop, flags.save), 1):
            scalars[i].fill_(float(value))
        torch.add(before, head, out=head)

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
        if len(shards) == 1:
            self.recurrent_states[shards[0]] = after
            return
        dim = self.workload.batch_dim
        parts = {name: torch.split(tensor, list(sizes), dim) for name, tensor in after.items()}
        for i, shard in enumerate(shards):
            self.recurrent_states[shard] = {name: part[i].contiguous() for name, part in parts.items()}


def touched(workload: Workload, layout: ParameterLayout, device: torch.device, epoch: int, step: int) -> list[Touched]:
    """The parameters of which a step touches some rows only, and these rows."""
    rows = workload.touched_rows(epoch, step)
    return layout.touched({name: upload(r, device) for name, r in rows.items()})


def _add(left: GradientBuffer, right: GradientBuffer) -> GradientBuffer:
    left.tensor.add_(right.tensor)
    return left
