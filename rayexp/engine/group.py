"""The workers of a run as one group: what they say to each other, in bytes and in rows.

A group of one says nothing. Between several, torch.distributed carries rows over gloo (CPU) or NCCL (GPU); on a GPU
with gloo a row is staged in host memory.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = datetime.timedelta(days=7)
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.14


@dataclass(frozen=True)
class _All:
    """Several transfers as one."""

    under_way: list[Any]

    def wait(self) -> None:
        for each in self.under_way:
            each.wait()


@dataclass(frozen=True)
class WorkerGroup:
    """`rank` of `world` workers; the others are process groups (None where the group has one member).

    `control` can carry CPU tensors whatever the backend of `rows` is.
    """

    rank: int = 0
    world: int = 1
    rows: Any = None
    control: Any = None
    _calls: list[int] = field(default_factory=lambda: [0, 0])

    @classmethod
    def join(
        cls,
        members: int | None = None,
        backend: str | None = None,
        timeout: datetime.timedelta | None = None,
        device: torch.device | None = None,
    ) -> WorkerGroup:
        """The initialised default process group, or its first `members` ranks.

        Every rank of the default group must call this. A rank that is not a member gets `rank` >= `world`.

        Args:
            backend: what carries gradient buffers; None: the default group's own.
            timeout: how long a new group waits for a rank that says nothing; None: torch's default.
            device: of this rank.
        """
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # before NCCL, which otherwise takes the first
        rank, size = dist.get_rank(), dist.get_world_size()
        members = size if members is None else members
        default = dist.get_backend()
        ranks = list(range(members))

        def group(backend: str) -> Any:
            same = members == size and backend == default
            return dist.group.WORLD if same else dist.new_group(ranks, timeout=timeout, backend=backend)

        rows = group(backend or default)
        control = group("gloo") if "nccl" in (backend or default) else rows
        return cls(rank, members, rows, control)

    @property
    def member(self) -> bool:
        """Whether this process takes part."""
        return self.rank < self.world

    @property
    def direct(self) -> bool:
        """Whether rows go from worker to worker (not NCCL): `collect` may then be called in another thread than
        `scatter`, and between any two of its calls."""
        return self.world > 1 and "nccl" not in dist.get_backend(self.rows)

    def gather(self, data: bytes) -> list[bytes]:
        """Everyone's bytes, in rank order, on every rank."""
        if self.world == 1:
            return [data]
        sizes = torch.zeros(self.world, dtype=torch.int64)
        _all_gather(sizes, torch.tensor([len(data)]), group=self.control)
        width = max(int(sizes.max()), 1)
        mine = torch.zeros(width, dtype=torch.uint8)
        if data:
            mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyone = torch.empty(self.world * width, dtype=torch.uint8)
        _all_gather(everyone, mine, group=self.control)
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
        return row.is_cuda and self.direct

    def scatter(self, rows: Tensor, out: Tensor) -> Any:
        """All-to-all, under way: part w of `rows` (W equal parts) goes to worker w; part w of `out` came from worker w,
        but for this worker's own, which is left as it was where rows go directly.

        The handle's `wait()` returns when `out` is there and `rows` may be written again.
        """
        if not self.direct:
            return dist.all_to_all_single(out, rows, group=self.rows, async_op=True)
        sent, received = rows.view(self.world, -1), out.view(self.world, -1)
        return self._swap(0, [sent[peer] for peer in range(self.world)], received)

    def collect(self, part: Tensor, out: Tensor) -> Any:
        """All-gather, under way: part w of `out` is worker w's `part`."""
        if not self.direct:
            return _all_gather(out, part, group=self.rows, async_op=True)
        parts = out.view(self.world, -1)
        if parts[self.rank].data_ptr() != part.data_ptr():
            parts[self.rank].copy_(part)
        return self._swap(1, [part] * self.world, parts)

    def _swap(self, kind: int, sent: Sequence[Tensor], received: Tensor) -> _All:
        """Send every other worker its tensor and receive one from each. gloo's own collectives copy once more."""
        tag = self._calls[kind] * 2 + kind + 1
        self._calls[kind] = (self._calls[kind] + 1) % (1 << 20)
        under_way = []
        for step in range(1, self.world):
            to, source = (self.rank + step) % self.world, (self.rank - step) % self.world
            under_way.append(dist.irecv(received[source], source, self.rows, tag))
            under_way.append(dist.isend(sent[to], to, self.rows, tag))
        return _All(under_way)

    def sum(self, row: Tensor) -> Callable[[], object]:
        """All-reduce in place, under way, in the backend's own order of additions; the function returned waits."""
        if not self.staged(row):
            done: Callable[[], object] = dist.all_reduce(row, group=self.rows, async_op=True).wait
            return done
        host = row.cpu()
        sent = dist.all_reduce(host, group=self.rows, async_op=True)
        return lambda: (sent.wait(), row.copy_(host))


def join(
    world: int,
    rank: int,
    address: str,
    timeout_s: float,
    backend: str = "gloo",
    device: torch.device | None = None,
) -> WorkerGroup:
    """Initialise torch.distributed at `address` (host:port, of rank 0), and return the group.

    Waits for all workers to come, however long they take: each packs its data before. Whoever started them sees when
    one is lost, and ends those who wait.

    Args:
        timeout_s: how long those who have joined wait for one that says nothing.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # as WorkerGroup.join
    host, _, port = address.rpartition(":")
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host.strip("[]"), int(port), world, rank == 0, PATIENCE, wait_for_workers=True
    )
    limit = datetime.timedelta(seconds=timeout_s)
    store.set_timeout(limit)
    dist.init_process_group(backend, store=store, world_size=world, rank=rank, timeout=limit)
    return WorkerGroup.join()


def leave() -> None:
    """End what `join` began, if it did."""
    if dist.is_initialized():
        dist.destroy_process_group()
