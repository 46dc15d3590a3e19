"""What only a GPU has: streams side by side, graphs that replay a captured step, and data that come in the background.

A step launches thousands of small kernels, and from Python that takes many times as long as they do. Captured in a CUDA
graph (`torch.cuda.graph`, PyTorch's notes on CUDA semantics) they are launched by one call. What a graph does is fixed:
it reads and writes the same addresses each time, and asks the device for nothing. So everything that changes from step
to step is a tensor that stays in its place (engine/inputs.py).
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
Position = tuple[int, int]
"""(epoch, step) of a batch."""

AHEAD = 3
"""Batches that are fed ahead: one under way, one ready, one for a late disk."""


_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. Before torch 2.13 the allocator goes on asking them which stream is theirs."""


@functools.cache
def stream_for(device: torch.device, use: str) -> torch.cuda.Stream:
    """The stream for one use, the same one as long as this process lives. PyTorch has 32 streams a device, which it
    hands out in turn: with new ones for every run two uses would come to share one, and to wait for each other."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """Streams on which so many replicas run side by side; none for one, which runs on the present stream."""
    return tuple(stream_for(device, f"replica {i}") for i in range(count)) if count > 1 else ()


def side_by_side(streams: Sequence[torch.cuda.Stream], tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Call each task with a stream of its own as the present one. Every stream waits for what was present before, and
    what was present waits for every stream: the rule by which several streams take part in one capture."""
    present = torch.cuda.current_stream()
    results = []
    for stream, task in zip(streams, tasks, strict=False):
        stream.wait_stream(present)
        with torch.cuda.stream(stream):
            results.append(task())
    for stream in streams[: len(tasks)]:
        present.wait_stream(stream)
    return results


class Graph:
    """Work that was captured once, and is replayed.

    Args:
        work: launches kernels on static tensors. It is called once, and nothing is computed by that call; call it in
            the ordinary way before, so that libraries have chosen their kernels.
        generators: random generators that `work` draws from. Seed them before each replay.
        pool: another graph, whose memory this one shares; the two never run at the same time.

    Raises:
        RuntimeError: `work` waits for the device, or does something else that cannot be captured. Generators that took
            part refuse to draw from then on (before torch 2.13), except the global one. What the capture had allocated
            stays allocated as long as the process lives (up to torch 2.14 at least).
    """

    def __init__(self, work: Callable[[], object], generators: Iterable[torch.Generator], pool: Graph | None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        if torch.__version__ < "2.14":  # from then on a graph finds its generators itself, and warns of every one
            for generator in generators:
                self._graph.register_generator_state(generator)
        torch.cuda.synchronize()
        # Other threads may use the device meanwhile: one feeds it, another saves a checkpoint.
        shared = None if pool is None else pool._graph.pool()
        present = torch.cuda.current_stream()
        own = stream_for(present.device, "capture")
        failure: BaseException | None = None
        try:
            with torch.cuda.graph(self._graph, pool=shared, stream=own, capture_error_mode="thread_local"):
                try:
                    work()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException:
            # A capture that failed raises once more at its end, which hides the reason and leaves its stream behind.
            torch.cuda.set_stream(present)
            self._clean_up(present.device)
            if failure is not None:
                raise failure from None
            raise

    def _clean_up(self, device: torch.device) -> None:
        """Undo what a failed capture leaves behind, as far as PyTorch lets one."""
        self._graph.reset()
        _failed.append(self._graph)
        # Every capture takes part of the global generator along, which then counts as being captured for ever.
        default = torch.cuda.default_generators[device.index]
        default.graphsafe_set_state(default.clone_state())

    def __call__(self) -> None:
        """Launch the captured work on the present stream."""
        self._graph.replay()


class Feeder:
    """Brings what coming steps are told onto the device: a thread computes it some steps ahead, and copies it from
    pinned memory by a stream of its own.

    Args:
        feed: host arrays for a batch, by name.
        following: the batch after one; None after the last.
    """

    def __init__(
        self,
        feed: Callable[[Position], Mapping[str, NDArray[Any]]],
        following: Callable[[Position], Position | None],
        device: torch.device,
    ) -> None:
        self._feed, self._following, self._device = feed, following, device
        self._stream = stream_for(device, "feeder")
        self._given: dict[str, Tensor] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "feeder")
        self._coming: deque[tuple[Position, concurrent.futures.Future[tuple[dict[str, Tensor], Any]]]] = deque()

    def get(self, position: Position) -> dict[str, Tensor]:
        """What a batch is told, on the device; the present stream may use it until the next call. Raises what `feed`
        raised."""
        present = torch.cuda.current_stream()
        # What was given last is used again, by the feeder's own stream, once the present stream has done with it.
        # (Tensor.record_stream would do as well, but after a capture that failed the allocator never frees these.)
        self._stream.wait_stream(present)
        self._given = {}
        if not self._coming or self._coming[0][0] != position:
            self._coming.clear()
            self._begin(position)
        _, first = self._coming.popleft()
        last: Position | None = self._coming[-1][0] if self._coming else position
        while len(self._coming) < AHEAD and last is not None and (last := self._following(last)) is not None:
            self._begin(last)
        self._given, arrived = first.result()
        present.wait_event(arrived)
        return self._given

    def rest(self) -> None:
        """Wait until the thread does nothing, since a capture is about to begin."""
        concurrent.futures.wait([future for _, future in self._coming])

    def _begin(self, position: Position) -> None:
        self._coming.append((position, self._thread.submit(self._send, position)))

    def _send(self, position: Position) -> tuple[dict[str, Tensor], Any]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            arrays = self._feed(position)
            found = {
                name: torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)
                for name, array in arrays.items()
            }
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return found, arrived
