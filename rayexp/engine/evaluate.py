"""Validation predictions. The configuration alone cuts the validation data into streams; workers and their replicas
share the streams, and a stream is evaluated with the same shapes whoever gets it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayexp.engine import order
from rayexp.engine.group import WorkerGroup
from rayexp.engine.runtime import Runtime
from rayexp.engine.workload import Workload
from rayexp.runs.records import Predictions

Part = Mapping[str, NDArray[Any]]


def predict(
    workload: Workload,
    models: list[nn.Module],
    group: WorkerGroup,
    runtime: Runtime,
    seen: Callable[[int, Part], None] | None = None,
) -> Predictions:
    """Predictions on the whole validation data, equal on every worker.

    Args:
        workload: cuts the data into streams, and predicts one.
        models: a model in eval mode for each replica.
        group: the workers, which share the streams.
        runtime: its replicas share this worker's streams.
        seen: called with each stream of this worker and its arrays, from the replica's thread. On a GPU that costs a
            wait for each stream; without it there is one wait, at the end.
    """
    mine = order.share(workload.val_streams(), group.world, group.rank)

    def work(replica: int) -> list[tuple[int, Part]]:
        done: list[tuple[int, Mapping[str, NDArray[Any] | Tensor]]] = []
        with torch.inference_mode():
            for stream in mine[replica :: runtime.replicas]:
                part = workload.predict(models[replica], stream, runtime.device)
                if seen is not None:
                    part = on_host(part)
                    seen(stream, part)
                done.append((stream, part))
            return [(stream, on_host(part)) for stream, part in done]

    parts = dict(item for done in runtime.each(work) for item in done)
    if group.world > 1:
        parts = {stream: part for data in group.gather(_pack(parts)) for stream, part in _unpack(data).items()}
    return workload.predictions([parts[stream] for stream in sorted(parts)])


def on_host(part: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, NDArray[Any]]:
    """The arrays of a stream in the host's memory; waits for the device if any is not there yet."""
    return {name: array.cpu().numpy() if isinstance(array, Tensor) else array for name, array in part.items()}


def _pack(parts: Mapping[int, Part]) -> bytes:
    buffer = io.BytesIO()
    arrays: Any = {f"{stream}/{name}": array for stream, part in parts.items() for name, array in part.items()}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _unpack(data: bytes) -> dict[int, dict[str, NDArray[Any]]]:
    parts: dict[int, dict[str, NDArray[Any]]] = {}
    with np.load(io.BytesIO(data), allow_pickle=False) as npz:
        for key in npz.files:
            stream, _, name = key.partition("/")
            parts.setdefault(int(stream), {})[name] = npz[key]
    return parts
