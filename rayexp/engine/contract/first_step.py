"""What every model is watched for in a process's first step, before any weight has changed.

A module that draws from a global generator draws other numbers with another number of workers. A buffer that training
writes, and that is not a running statistic of a batch norm, is neither reduced nor saved. A batch norm that runs twice
in a pass would write two statistics into one place. Each is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from rayexp.engine.batch_norm import BATCH_NORMS
from rayexp.engine.checkpoint import sha
from rayexp.engine.contract.breach import Breach, named
from rayexp.errors import UserError


class FirstStep:
    """Watches a replica's module through a step, until `end`.

    Attributes:
        model: the module.
        known: names of the buffers that are reduced and saved.
        buffers: sha256 of every other buffer, by name, as they were at the start.
    """

    def __init__(self, model: nn.Module, known: Container[str]) -> None:
        self.model, self.known = model, known
        self.buffers = self._foreign()
        self._calls: Counter[str] = Counter()
        self._most: Counter[str] = Counter()
        self._hooks = [model.register_forward_pre_hook(lambda module, inputs: self._calls.clear())]
        for name, module in model.named_modules():
            if isinstance(module, BATCH_NORMS):
                self._hooks.append(module.register_forward_pre_hook(self._counting(name)))

    def end(self) -> None:
        """Stop watching.

        Raises:
            UserError: a buffer was written, or a batch norm ran twice.
        """
        if found := self.found():
            raise UserError(str(found[0]))

    def found(self) -> list[Breach]:
        """Stop watching, and return all batch norms that ran twice, and all buffers that were written."""
        for hook in self._hooks:
            hook.remove()
        twice = [
            Breach(
                "model",
                name,
                f"the batch norm {name} runs {times} times in a pass and has one place for its statistics",
                "one batch norm for each place",
                "always",
            )
            for name, times in self._most.items()
            if times > 1
        ]
        now = self._foreign()
        written = [
            Breach(
                "model",
                name,
                f"training writes the buffer {name}, which no worker reduces and no checkpoint holds",
                "the running statistics of batch norms, and buffers that stay as they are",
                "always",
            )
            for name in dict.fromkeys([*self.buffers, *now])
            if self.buffers.get(name) != now.get(name)
        ]
        return twice + written

    def _counting(self, name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: Any) -> None:
            self._calls[name] += 1
            self._most[name] = max(self._most[name], self._calls[name])

        return count

    def _foreign(self) -> dict[str, str]:
        buffers = self.model.named_buffers(remove_duplicate=False)
        return {name: sha({name: buffer}) for name, buffer in buffers if name not in self.known}


def generators(device: torch.device) -> list[Tensor]:
    """The states of the global generators that an operation on this device may draw from, uint8 tensors."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def moved(before: list[Tensor], device: torch.device) -> bool:
    """Whether anything has drawn from a global generator since `generators` returned `before`."""
    return not all(map(torch.equal, before, generators(device)))


def refuse_drawing(model: nn.Module, device: torch.device, run: Callable[[], object]) -> None:
    """Find what draws from a global generator while `run` makes a pass through the model.

    Raises:
        UserError: something does; the message names the innermost module. Where `run` does not draw, something else in
            this process did, and nothing is raised.
    """
    begun: list[list[Tensor]] = []
    found: list[str] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        begun.append(generators(device))

    def leave(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if moved(begun.pop(), device) and not found:
                found.append(named(name, module))

        return look

    hooks: list[Any] = []
    for name, module in model.named_modules():
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave(name))]
    before = generators(device)
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if moved(before, device):
        raise UserError(
            f"reduction: exact draws per shard, and {found[0] if found else 'the loss'} draws from PyTorch's global "
            "generator (functional dropout?); it takes nn.Dropout and StochasticDepth; allowed with this model: ddp"
        )
