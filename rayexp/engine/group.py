"""The workers of a run as one group: what they say to each other, in bytes and in rows.

A group of one says nothing. Between several, torch.distributed carries rows over gloo (CPU) or NCCL (GPU); on a GPU
with gloo a row is staged in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """`rank` of `world` workers; `rows` and `control` are process groups (None where the group has one member).

    `control` can carry CPU tensors whatever the backend of `rows` is.
    """

    rank: int = 0
    world: int = 1
    rows: Any = None
    control: Any = None

    @classmethod
    def join(cls, members: int | None = None) -> Group:
        """The initialised default process group, or its first `members` ranks.

        Every rank of the default group must call this. A rank that is not a member gets `rank` >= `world`.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        members = size if members is None else members
        everyone = members == size
        nccl = "nccl" in dist.get_backend()
        ranks = list(range(members))
        rows = dist.group.WORLD if everyone else dist.new_group(ranks)
        control = dist.new_group(ranks, backend="gloo") if nccl else rows
        return cls(rank, members, rows, control)

    @property
    def member(self) -> bool:
        """Whether this process takes part."""
        return self.rank < self.world

    def gather(self, data: bytes) -> list[bytes]:
        """Everyone's bytes, in rank order, on every rank."""
        if self.world == 1:
            return [data]
        sizes = torch.zeros(self.world, dtype=torch.int64)
        dist.all_gather_into_tensor(sizes, torch.tensor([len(data)]), group=self.control)
        width = max(int(sizes.max()), 1)
        mine = torch.zeros(width, dtype=torch.uint8)
        if data:
            mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyone = torch.empty(self.world * width, dtype=torch.uint8)
        dist.all_gather_into_tensor(everyone, mine, group=self.control)
        return [bytes(everyone[r * width : r * width + int(n)].numpy()) for r, n in enumerate(sizes)]

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank."""
        if self.world == 1:
            return data or b""
        size = torch.tensor([len(data or b"")])
        dist.broadcast(size, 0, group=self.control)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == 0 and data:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if int(size):
            dist.broadcast(buffer, 0, group=self.control)
        return bytes(buffer.numpy())

    def barrier(self) -> None:
        """Wait for everyone."""
        self.gather(b"")

    def staged(self, row: Tensor) -> bool:
        """Whether rows on this device travel through host memory."""
        return row.is_cuda and "nccl" not in dist.get_backend(self.rows)

    def scatter(self, rows: Tensor, out: Tensor) -> Any:
        """All-to-all, under way: part w of `rows` (W equal parts) goes to worker w; part w of `out` came from worker w.

        The handle's `wait()` returns when `out` is there.
        """
        return dist.all_to_all_single(out, rows, group=self.rows, async_op=True)

    def collect(self, part: Tensor, out: Tensor) -> Any:
        """All-gather, under way: part w of `out` is worker w's `part`."""
        return dist.all_gather_into_tensor(out, part, group=self.rows, async_op=True)

    def sum(self, row: Tensor) -> Callable[[], object]:
        """All-reduce in place, under way, in the backend's own order of additions; the function returned waits."""
        if not self.staged(row):
            done: Callable[[], object] = dist.all_reduce(row, group=self.rows, async_op=True).wait
            return done
        host = row.cpu()
        sent = dist.all_reduce(host, group=self.rows, async_op=True)
        return lambda: (sent.wait(), row.copy_(host))
