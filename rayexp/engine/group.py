"""The workers of a run as one group, which exchange bytes and tensors.

A group of one exchanges nothing. Between several workers, torch.distributed carries tensors over gloo (CPU) or NCCL
(GPU); from a GPU over gloo they are staged in host memory.
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
    """Several transfers as one.

    Attributes:
        under_way: handles of torch.distributed, each with `wait()`.
    """

    under_way: list[Any]

    def wait(self) -> None:
        for each in self.under_way:
            each.wait()


@dataclass(frozen=True)
class WorkerGroup:
    """This process among the workers.

    Attributes:
        rank: this worker, from 0.
        world: number of workers.
        data: the process group for gradient buffers; None where there is one worker.
        control: a process group for tensors on the CPU, whatever the backend of `data`; None where there is one worker.
    """

    rank: int = 0
    world: int = 1
    data: Any = None
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

        data = group(backend or default)
        control = group("gloo") if "nccl" in (backend or default) else data
        return cls(rank, members, data, control)

    @property
    def direct(self) -> bool:
        """Whether tensors are sent from worker to worker (gloo, not NCCL): `collect` may then be called in another
        thread than `scatter`, and between any two of its calls."""
        return self.world > 1 and "nccl" not in dist.get_backend(self.data)

    def gather(self, data: bytes) -> list[bytes]:
        """The bytes of all workers, in rank order, on every worker."""
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
        """Rank 0's bytes, on every worker."""
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
        """Wait for all workers."""
        self.gather(b"")

    def staged(self, tensor: Tensor) -> bool:
        """Whether tensors on this one's device travel through host memory."""
        return tensor.is_cuda and self.direct

    def scatter(self, tensor: Tensor, out: Tensor) -> Any:
        """Start an all-to-all: part w of `tensor` (W equal parts) goes to worker w, part w of `out` comes from worker
        w. This worker's own part of `out` stays as it is where the group is `direct`.

        Returns:
            A handle whose `wait()` returns when `out` has arrived and `tensor` may be written again.
        """
        if not self.direct:
            return dist.all_to_all_single(out, tensor, group=self.data, async_op=True)
        sent, received = tensor.view(self.world, -1), out.view(self.world, -1)
        return self._swap(0, [sent[peer] for peer in range(self.world)], received)

    def collect(self, part: Tensor, out: Tensor) -> Any:
        """Start an all-gather: part w of `out` becomes worker w's `part`. Returns a handle with `wait()`."""
        if not self.direct:
            return _all_gather(out, part, group=self.data, async_op=True)
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
            under_way.append(dist.irecv(received[source], source, self.data, tag))
            under_way.append(dist.isend(sent[to], to, self.data, tag))
        return _All(under_way)

    def sum(self, tensor: Tensor) -> Callable[[], object]:
        """Start an all-reduce in place, in the backend's own order of additions; the function returned waits for it."""
        if not self.staged(tensor):
            done: Callable[[], object] = dist.all_reduce(tensor, group=self.data, async_op=True).wait
            return done
        host = tensor.cpu()
        sent = dist.all_reduce(host, group=self.data, async_op=True)
        return lambda: (sent.wait(), tensor.copy_(host))


def join(
    world: int,
    rank: int,
    address: str,
    timeout_s: float,
    backend: str = "gloo",
    device: torch.device | None = None,
) -> WorkerGroup:
    """Initialise torch.distributed and return the group.

    Waits until all workers have come, however long they take, since each packs its data first. Whoever started them
    notices a lost one and ends those who wait.

    Args:
        world, rank: number of workers, and this one.
        address: host:port of rank 0.
        timeout_s: after all have joined, seconds to wait for a worker that does not answer.
        backend: gloo or nccl.
        device: where this worker computes.
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
    """Leave the group that `join` made, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
