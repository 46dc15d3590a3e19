"""The global random generators that a model must leave alone: whether it has drawn from them, and how they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GlobalStates:
    """The states of the global generators of this process.

    Attributes:
        cpu: of PyTorch's on the CPU: uint8[n].
        cuda: of PyTorch's on the present GPU, uint8[n]; None: computation is on the CPU.
        numpy: of `numpy.random`.
        python: of `random`.
    """

    cpu: Tensor
    cuda: Tensor | None
    numpy: dict[str, Any]
    python: Any

    @classmethod
    def now(cls, device: torch.device) -> GlobalStates:
        """As they are now."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, dict(np.random.get_state(legacy=False)), random.getstate())

    def restore(self, device: torch.device) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def moved(self, since: GlobalStates) -> list[str]:
        """The generators that something has drawn from since the other states, in words."""
        found = []
        pairs = [(self.cpu, since.cpu), (self.cuda, since.cuda)]
        if any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs):
            found.append("PyTorch's")
        if _numpy(self.numpy) != _numpy(since.numpy):
            found.append("numpy's")
        if self.python != since.python:
            found.append("Python's")
        return found


def _numpy(state: dict[str, Any]) -> tuple[Any, ...]:
    inner = state["state"]
    return (inner["key"].tobytes(), inner["pos"], state["has_gauss"], state["gauss"])


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[GlobalStates]:
    """The global generators are after the block as they were before it; yields these states."""
    before = GlobalStates.now(device)
    try:
        yield before
    finally:
        before.restore(device)
