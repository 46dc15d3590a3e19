"""One optimizer step: the replicas compute shards, the tree and the exchange add them up, the optimizer updates.

On a CPU replicas run in threads, and the exchange overlaps the backward pass. On a GPU they run on streams. A step is a
function of tensors that stay in their place and asks the device for no value, so it is captured: the passes and this
worker's part of the tree are one graph, the update is another, and the exchange between workers lies between the two.
The loss and the control flags of a step are read when the next one is under way already (see engine/trainer.py).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayexp.config import ExperimentConfig
from rayexp.engine import order
from rayexp.engine.exchange import AllReduce, Assembly, Exchange, ExchangePlan
from rayexp.engine.gpu import Feeder
from rayexp.engine.gradients import GradientBuffer, Master, ParameterLayout, Touched
from rayexp.engine.group import WorkerGroup
from rayexp.engine.inputs import StepInputs
from rayexp.engine.optimizer import Optimizer
from rayexp.engine.passes import Held, Passes, add
from rayexp.engine.programs import Program, Programs
from rayexp.engine.reduction import Forest
from rayexp.engine.runtime import Runtime, upload
from rayexp.engine.watched import watched
from rayexp.engine.workload import Workload


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


class Stepper:
    """Computes this worker's part of every step, and updates the master with the sum over all workers.

    Attributes:
        exact: whether the reduction is `exact`.
        passes: what computes this worker's shards.
        exchange: what adds up over workers.
        plan: the order in which buckets are sent.
        late: how many steps later a result should be asked for, so that the device need not be waited for.
        programs: what runs a step, by the shape of its batch, and how.
        captures: seconds that the step launched last was captured for, by half; no step's figures hold them.
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
        self.passes = Passes(config, workload, master, runtime, self.shards)
        size, without = master.layout.buffer_size, self._touched(1, 0)
        self.exchange: Exchange | AllReduce = AllReduce(group, size, self.passes.leaves, without=without)
        if self.exact:
            self.exchange = Exchange(group, config.shards, size, runtime.device, without=without)
        self.plan = ExchangePlan(master.layout, self.exchange)
        self.late = int(runtime.static)
        # What these two are given is no method of this object: in a circle with it, the data's files stayed open.
        self._feeder: Feeder | None = None
        if runtime.device.type == "cuda":
            shards, following = self.shards, functools.partial(_following, workload.steps(), config.epochs)
            self._feeder = Feeder(lambda at: workload.feed(*at, shards), following, runtime.device)
        rest = self._feeder.rest if self._feeder is not None else None
        self.programs = Programs(self.passes, optimizer.rule, rest)
        self._watch_next = not self.passes.compiled  # hooks would have a compiled model compiled twice

    def launch(
        self, epoch: int, step: int, global_step: int, lr: float, flags: ControlFlags
    ) -> Callable[[], StepResult]:
        """Start one step.

        Args:
            epoch, step: which batch (see engine/workload.py).
            global_step: optimizer steps done before this one.
            lr: the learning rate.
            flags: what this worker asks for.

        Returns:
            What waits for the step and returns its result.
        """
        captures = self.captures = {"compute": 0.0, "update": 0.0}
        begun, start = self.runtime.mark(), time.perf_counter()
        fed = self._fed(epoch, step)
        waited = time.perf_counter() - start
        program = self._program(step, fed)
        program.inputs.tell(fed, lr, global_step, flags.stop, flags.save)
        touched = self._touched(epoch, step)
        self.passes.begin(epoch, step, program.inputs)
        marks = [begun, self.runtime.mark()]
        first, self._watch_next = self._watch_next, False
        made = 0.0  # seconds of the passes that made batches; in a static step they are part of its work
        with watched(self.passes, program.inputs) if first else contextlib.nullcontext(), self.passes.fixed_weights():
            if self.runtime.static:
                self._static(program, step == 0, marks)
            else:
                made = self._overlapped(program, touched, marks)
        marks.append(self.runtime.mark())
        self.programs.run(program, "update", lambda: self._update(program, touched), captures)
        scalars = self.runtime.download(self.master.layout.scalars(program.held[0][1].tensor))
        marks.append(self.runtime.mark())
        program.runs += 1
        if not self.runtime.static:
            for _, buffer in program.held:
                self.passes.recycle(buffer)

        def result() -> StepResult:
            self.runtime.wait(marks[-1])
            loss, count, stops, saves = scalars.tolist()
            told, computed, reduced, updated = [self.runtime.seconds(a, b) for a, b in itertools.pairwise(marks)]
            # A GPU waits for its data where the thread that feeds it is late; this thread's waiting costs nothing.
            data = told if self._feeder is not None else waited + made
            phases = {
                "data": data,
                "transfer": 0.0,
                "compute": max(0.0, told + computed - data - captures["compute"]),
                "reduce": reduced,
                "optimizer": max(0.0, updated - captures["update"]),
            }
            return StepResult(loss, int(count), ControlFlags(stops > 0, saves > 0), phases)

        return result

    @property
    def capture(self) -> str:
        """How steps run (see `Programs`)."""
        return self.programs.capture

    @property
    def exchange_bytes(self) -> int:
        """Bytes that a worker brings to the exchange in an epoch's first step; of an embedding, the touched rows."""
        saved = sum(part.stop - part.start - len(part.rows) * part.shape[1] for part in self._touched(1, 0))
        return 4 * (self.master.layout.buffer_size - saved)

    def _touched(self, epoch: int, step: int) -> list[Touched]:
        return touched(self.workload, self.master.layout, self.runtime, epoch, step)

    def _fed(self, epoch: int, step: int) -> Mapping[str, Tensor]:
        if self._feeder is not None:
            return self._feeder.get((epoch, step))
        fed = self.workload.feed(epoch, step, self.shards)
        return {name: upload(array, self.runtime.device) for name, array in fed.items()}

    def _program(self, step: int, fed: Mapping[str, Tensor]) -> Program:
        """What runs batches of this shape."""
        sizes = self.workload.sizes(step, self.shards)
        shape = (sizes, tuple(sorted((name, tensor.shape) for name, tensor in fed.items())))
        device, batch_dim, static = self.runtime.device, self.workload.batch_dim, self.runtime.static
        return self.programs.of(shape, lambda: StepInputs(self.shards, sizes, device, batch_dim, static))

    # ------------------------------------------------------------------ threads: the exchange overlaps the passes

    def _overlapped(self, program: Program, touched: Sequence[Touched], marks: list[Any]) -> float:
        """Compute and add up over all workers; returns the seconds that a replica needed to make its batches."""
        replicas = self.passes.replicas
        assembly = Assembly(self.plan, self.exchange, len(replicas), touched, self.runtime.each)

        def work(number: int) -> float:
            def last(held: Held) -> None:
                assembly.held[number] = held
                replicas[number].on_gradient = lambda parameter: assembly.gradient_ready(number, parameter)

            seconds = self.passes.compute(number, program.inputs, touched, last)
            replicas[number].on_gradient = None
            assembly.pass_ended(number)
            return seconds

        seconds = self.passes.each(work)
        marks.append(self.runtime.mark())
        assembly.finish()
        program.held = list(itertools.chain.from_iterable(assembly.held))
        return sum(seconds) / len(replicas)

    # ------------------------------------------------------------------ streams: captured, the exchange in between

    def _static(self, program: Program, epoch_begins: bool, marks: list[Any]) -> None:
        """Compute and add up over all workers."""
        if epoch_begins:
            self.programs.check()
        states = self.passes.states() if program.runs < 2 else {}
        while True:
            try:
                self.programs.run(program, "compute", lambda: self._forest(program), self.captures)
                break
            except torch.OutOfMemoryError:
                if program.runs >= 2 or not self.programs.make_room():
                    raise
                for shard, state in states.items():
                    self.passes.keep_state(shard, state)
                self.passes.seed(self.shards)
        marks.append(self.runtime.mark())
        if self.group.world > 1:
            for bucket in self.plan.order:
                where = self.exchange.buckets[bucket]
                self.exchange.send(bucket, [buffer.tensor[where] for _, buffer in program.held])
            self.exchange.finish()

    def _forest(self, program: Program) -> None:
        """This worker's part of the tree. The buffers are given back at once: only the coming step overwrites
        them, after this one's update."""
        self.master.round_weights()
        inputs = self.passes.prepared(program.inputs)
        held: list[Held] = [[] for _ in self.passes.replicas]

        def compute(number: int) -> float:
            return self.passes.compute(number, inputs, (), lambda mine: held.__setitem__(number, mine))

        def work(number: int) -> float:
            if program.runs:
                return compute(number)
            return self.programs.measured(number, functools.partial(compute, number))

        self.passes.each(work)
        forest = Forest[GradientBuffer](self.passes.leaves, add, self.passes.recycle)
        for node, buffer in itertools.chain.from_iterable(held):
            forest.push(node, buffer)
        program.held = forest.nodes()
        for _, buffer in program.held:
            self.passes.recycle(buffer)

    def _update(self, program: Program, touched: Sequence[Touched]) -> None:
        root, inputs = program.held[0][1].tensor, program.inputs
        self.optimizer.update(root, inputs.lr, inputs.done, self.runtime, touched)
        self.master.update_stats(root, self.config.shards, inputs.done)


def _following(steps: int, epochs: int, at: tuple[int, int]) -> tuple[int, int] | None:
    """The batch after one; None after the last."""
    epoch, step = at
    if step + 1 < steps:
        return epoch, step + 1
    return (epoch + 1, 0) if epoch < epochs else None


def touched(workload: Workload, layout: ParameterLayout, runtime: Runtime, epoch: int, step: int) -> list[Touched]:
    """The parameters of which a step touches some rows only, and these rows; none where steps are static."""
    if runtime.static:
        return []
    rows = workload.touched_rows(epoch, step)
    return layout.touched({name: upload(r, runtime.device) for name, r in rows.items()})
