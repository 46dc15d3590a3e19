"""A step as graphs: when a program's halves are captured, what is asked of a capture, and what follows where one fails.

A graph holds memory of its own and stands for no Python. So before the first one there must be room for all replicas
side by side, and after each Python must be as it was (engine/capture_watch.py). Where memory is short, a step goes on
with fewer replicas; where a step cannot be captured, it and all later ones run as they stand.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from rayexp.config.references import place
from rayexp.engine.capture_watch import CaptureWatch
from rayexp.engine.counters import Counter
from rayexp.engine.inputs import StepInputs
from rayexp.engine.passes import Held, Passes
from rayexp.engine.python_state import PythonState
from rayexp.errors import UserError

MARGIN = 1.15
"""How many times the memory that its passes take a graph may take: blocks are rounded, and cut up by streams."""
T = TypeVar("T")


@dataclass
class Program:
    """A step for batches of one shape, on static tensors.

    Attributes:
        inputs: what it is told.
        held: this worker's part of the tree after the passes; the first buffer holds the sum after the exchange.
        compute, update: the captured halves; None until they are captured.
        runs: how often it has run.
    """

    inputs: StepInputs
    held: Held = field(default_factory=list)
    compute: Callable[[], object] | None = None
    update: Callable[[], object] | None = None
    runs: int = 0


class Programs:
    """The programs of a worker's steps, one for each shape of batch, and their graphs.

    Attributes:
        capture: how steps run, for run.json: `graph`, or `eager` and why; empty before that is known.

    Args:
        passes: what computes the shards.
        rule: the user's own update rule, where there is one; a graph must not stand for its Python.
        rest: waits until no other thread of this process uses the device, since a capture is about to begin; None where
            there is no other.
    """

    def __init__(self, passes: Passes, rule: object, rest: Callable[[], None] | None) -> None:
        self.passes, self.config, self.runtime = passes, passes.config, passes.runtime
        self.capture = "eager: capture is false" if self.config.capture is False else ""
        self._rule, self._rest = rule, rest
        self._by_shape: dict[object, Program] = {}
        self._capturing = self.runtime.static and self.config.capture is not False
        self._first_graph: Any = None
        self._kept: list[list[Tensor]] = []  # for each graph, what it reads
        self._stands_for: PythonState | None = None  # what Python held when the first graph was captured
        self._counters: dict[str, Counter] = {}  # of what is captured
        self._needs: dict[int, int] = {}  # bytes that a replica's passes take for a while, by its number

    def __iter__(self) -> Iterator[Program]:
        return iter(self._by_shape.values())

    def of(self, shape: object, inputs: Callable[[], StepInputs]) -> Program:
        """The program for batches of this shape; the first such batch makes its inputs."""
        if shape not in self._by_shape:
            self._by_shape[shape] = Program(inputs())
        return self._by_shape[shape]

    def measured(self, number: int, work: Callable[[], T]) -> T:
        """What the passes of a replica return. The memory that they take is noted, for the graph that will."""
        result, needed = self.runtime.transient(work)
        self._needs[number] = max(needed, self._needs.get(number, 0))
        return result

    def run(self, program: Program, half: str, work: Callable[[], None], seconds: dict[str, float]) -> None:
        """Run one half of a step: captured where it is, else as it stands. A program runs once before it is captured,
        so that libraries have chosen their kernels and memory is there.

        Args:
            half: `compute` or `update`.
            work: what the half does.
            seconds: by half; those that a capture takes are added.

        Raises:
            torch.OutOfMemoryError: memory is too short for a graph of all replicas (see `make_room`).
            UserError: capture is true, and this half cannot be captured.
        """
        if self._capturing and program.runs and getattr(program, half) is None:
            start = time.perf_counter()
            try:
                setattr(program, half, self._captured(program, half, work))
                self.capture = "graph"
            except RuntimeError as error:
                self.passes.renew_generators()
                short = isinstance(error, torch.OutOfMemoryError)
                if short and half == "compute" and len(self.passes.replicas) > 1:
                    raise
                reason = "too little memory for a graph" if short else str(error).strip() or type(error).__name__
                where = place(error, self.config.code)
                self._give_up(reason.splitlines()[0] + (f", {where}" if where else ""))
            finally:
                seconds[half] += time.perf_counter() - start
        (getattr(program, half) or work)()

    def check(self) -> None:
        """Give graphs up where Python no longer holds what it held when the first was captured: an epoch's last batch
        may have changed that, where it is shorter, or an evaluation. (To be asked when an epoch begins.)

        Raises:
            UserError: capture is true, and it does not.
        """
        if self._first_graph is not None and self._stands_for is not None:
            now = PythonState(self._trained(), self.runtime.device)
            if changed := next(now.differs(self._stands_for, without=self._counters), None):
                self._give_up(f"{changed}, which a graph does not see")

    def make_room(self) -> bool:
        """Go on with half of the replicas, or with the last one without graphs, since memory is short; False: neither
        is left. The graphs so far are given up, with their memory.

        Raises:
            UserError: capture is true, and the last replica's graphs are in the way.
        """
        replicas = self.passes.replicas
        if len(replicas) == 1 and self._first_graph is None:
            return False
        self.runtime.synchronize()  # kernels under way still use what is freed now
        if len(replicas) == 1:
            self._give_up("too little memory beside graphs")
        del replicas[max(1, len(replicas) // 2) :]
        self._forget_graphs()
        torch.cuda.empty_cache()
        return True

    def _captured(self, program: Program, half: str, work: Callable[[], None]) -> Callable[[], object]:
        if self._first_graph is None:
            self._check_memory()
        if self._rest is not None:
            self._rest()
        passes = self.passes
        drawing = passes.generators.values() if half == "compute" and passes.replicas[0].draws_numbers else ()
        watch = CaptureWatch(self._parts(), self.runtime.device, follow=not passes.compiled)
        with watch:
            graph = self.runtime.graph(work, drawing, self._first_graph)
        first, held = self._first_graph is None, program.held

        def again() -> None:
            self.runtime.graph(work, drawing, self._first_graph or graph)
            program.held = held  # where the graph that stays has its sum

        counters = watch.counters(self._counters.values(), first, again)
        self._counters |= {counter.name: counter for counter in counters}
        self._kept.append(watch.read())
        if self._first_graph is None:
            self._first_graph = graph
            self._stands_for = PythonState(self._trained(), self.runtime.device)
        return functools.partial(_replay, graph, counters) if counters else graph

    def _parts(self) -> dict[str, object]:
        """Whose Python graphs stand for, by what a message calls it."""
        return {**self._trained(), "workload": self.passes.workload}

    def _trained(self) -> dict[str, object]:
        """The same without the workload, whose `feed` may change what it holds from epoch to epoch."""
        return {**self.passes.models(), "optimizer": self._rule}

    def _check_memory(self) -> None:
        """Raise OutOfMemoryError where the replicas do not fit into a graph side by side.

        As they stand they may: then the allocator moves memory from stream to stream, for which it waits. In a capture
        it cannot, and PyTorch never gives back what a capture has taken that failed.
        """
        needed = sum(self._needs.get(number, 0) for number in range(len(self.passes.replicas)))
        if needed and needed * MARGIN > (free := self.runtime.free_memory()):
            raise torch.OutOfMemoryError(f"a graph takes {needed >> 20:,} MiB, and {free >> 20:,} MiB are free")

    def _give_up(self, reason: str) -> None:
        """Run this and all later steps as they stand."""
        if self.config.capture is True:
            raise UserError(f"capture: true, and this step cannot be captured ({reason}); allowed: auto, false")
        self._capturing, self.capture = False, f"eager: {reason}"
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._first_graph = None
        self._counters.clear()
        self._kept.clear()
        for program in self:
            program.compute = program.update = None


def _replay(graph: Callable[[], object], counters: Sequence[Counter]) -> None:
    """A graph, and what the Python that it stands for counts."""
    graph()
    for counter in counters:
        counter.advance()
