"""A process's first step: watched for what a model must not do, which is refused before any weight has changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rayexp.engine.contract import FirstStep, generators, module_of, moved, operation_of, refusal, refuse_drawing
from rayexp.engine.inputs import StepInputs
from rayexp.engine.passes import Passes


@contextlib.contextmanager
def watched(passes: Passes, inputs: StepInputs) -> Iterator[None]:
    """Watch the passes of a step inside the block.

    Raises:
        UserError: the model does what the engine cannot reproduce.
    """
    runtime, replica = passes.runtime, passes.replicas[0]
    module, device = replica.model.module, runtime.device
    shards = range(passes.shards.start, passes.shards.start + 1)

    def run() -> float:
        # A new buffer: the step's result is in one that may be used again.
        buffer = replica.bind(replica.new_buffer(), ())
        passes.seed(shards)
        return passes.one(replica, buffer, inputs, shards)

    def again() -> None:
        state = passes.states()[shards.start]
        try:
            runtime.run([run])
        finally:
            passes.keep_state(shards.start, state)

    first = FirstStep(module, {slot.name for slot in passes.master.layout.stats})
    before = generators(device)
    try:
        yield
    except RuntimeError as error:
        first.found()
        if (operation := operation_of(error)) is None:
            raise
        raise refusal(operation, device, module_of(module, again)) from error
    first.end()
    if passes.exact and moved(before, device):
        refuse_drawing(module, device, again)
