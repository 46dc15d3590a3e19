"""The contract that a model must keep so that the engine keeps its promises.

first_step   watches every model in a process's first step, before any weight has changed
check        tries a model on a few samples before it is trained at all, and names all that it finds
structure    what can be seen without a pass
passes       tiny shards in both orders and on two copies: the same bits, and nothing written
batches      tiny shards alone and together: the same sums; a copy and the original: the same gradients
evaluation   validation samples in both orders and in other batches
determinism  which module has no deterministic kernel
calls, draws what the modules see and give in a pass, and who draws from a global generator
"""

from __future__ import annotations

from rayexp.engine.contract.determinism import module_of, operation_of, refusal
from rayexp.engine.contract.first_step import FirstStep, generators, moved, refuse_drawing

__all__ = ["FirstStep", "generators", "module_of", "moved", "operation_of", "refusal", "refuse_drawing"]
