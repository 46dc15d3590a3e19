"""What a step is told: all that changes from step to step, in tensors that a captured step can read."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor


class StepInputs:
    """What a step is told. With `static`, tensors stay in their place and are overwritten, so that a captured step
    reads the new values.

    Attributes:
        shards: this worker's shards.
        sizes: samples of each of them.
        fed: what the workload feeds (see engine/workload.py), by name.
        lr: the learning rate: float64[] on a CPU, float32[] on a GPU.
        done: fp32[], optimizer steps before this one.
        flags: fp32[2], whether this worker asks to stop and to save, 0 or 1.

    Args:
        batch_dim: the dimension of `fed` along which samples lie; a tensor without dimensions holds for all of them.
    """

    def __init__(
        self, shards: range, sizes: tuple[int, ...], device: torch.device, batch_dim: int, static: bool
    ) -> None:
        self.shards, self.sizes, self.fed = shards, sizes, dict[str, Tensor]()
        self._dim, self._static = batch_dim, static
        exact = torch.float32 if device.type == "cuda" else torch.float64
        self.lr = torch.zeros((), dtype=exact, device=device)
        self.done = torch.zeros((), device=device)
        self.flags = torch.zeros(2, device=device)

    def tell(self, fed: Mapping[str, Tensor], lr: float, done: int, stop: bool, save: bool) -> None:
        """Tell the coming step everything. Numbers are filled in, which no device is waited for."""
        for name, tensor in fed.items():
            if self._static and name in self.fed:
                self.fed[name].copy_(tensor)
            else:
                self.fed[name] = tensor.clone() if self._static else tensor
        self.lr.fill_(lr)
        self.done.fill_(done)
        for i, flag in enumerate((stop, save)):
            self.flags[i].fill_(float(flag))

    def with_fed(self, fed: Mapping[str, Tensor]) -> StepInputs:
        """The same with something else in the place of `fed`."""
        other = copy.copy(self)
        other.fed = dict(fed)
        return other

    def of(self, shards: range) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """What consecutive shards are fed, as views, and their sizes."""
        first, last = shards.start - self.shards.start, shards.stop - self.shards.start
        sizes = self.sizes[first:last]
        start = sum(self.sizes[:first])
        found = {
            name: tensor.narrow(self._dim, start, sum(sizes)) if tensor.ndim else tensor
            for name, tensor in self.fed.items()
        }
        return found, sizes
