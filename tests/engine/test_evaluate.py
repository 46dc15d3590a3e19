"""Validation is shared by workers and replicas: every stream is predicted once, and all workers hold all."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.evaluate import predict
from rayexp.engine.group import WorkerGroup
from rayexp.engine.runtime import Runtime, configure
from rayexp.runs.records import Predictions

STREAMS = 7


def replicas_of(lanes: int) -> Runtime:
    config = parse({"scaling": {"lanes": lanes}}, ExperimentConfig, "test")
    return configure(config, torch.device("cpu"), config.shards, 1)


class Streams:
    """Stream s says (s, s, ...) of s + 1 samples, and which model predicted."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def val_streams(self) -> int:
        return STREAMS

    def predict(self, model: nn.Module, stream: int, device: torch.device) -> Mapping[str, NDArray[Any]]:
        assert torch.is_inference_mode_enabled()
        self.asked.append(stream)
        return {"index": np.full(stream + 1, stream), "loss": np.full(stream + 1, stream, np.float32)}

    def predictions(self, parts: Sequence[Mapping[str, NDArray[Any]]]) -> Predictions:
        return Predictions("images", "sha", {n: np.concatenate([p[n] for p in parts]) for n in parts[0]})


class Table(WorkerGroup):
    """Workers that are threads of this process."""

    def __init__(self, rank: int, world: int, shared: dict[int, bytes], barrier: threading.Barrier) -> None:
        super().__init__(rank, world)
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "meet", barrier)

    def gather(self, data: bytes) -> list[bytes]:
        self.shared[self.rank] = data
        self.meet.wait()
        return [self.shared[rank] for rank in range(self.world)]


@pytest.mark.parametrize("world", [1, 2, 3, 9])
@pytest.mark.parametrize("lanes", [1, 2])
def test_everyone_has_all_streams_in_order(world: int, lanes: int) -> None:
    workloads = [Streams() for _ in range(world)]
    seen: list[int] = []
    found: list[Predictions | None] = [None] * world
    shared: dict[int, bytes] = {}
    barrier = threading.Barrier(world, timeout=20)

    def worker(rank: int) -> None:
        runtime = replicas_of(lanes)
        models: list[nn.Module] = [nn.Identity() for _ in range(lanes)]
        group = Table(rank, world, shared, barrier) if world > 1 else WorkerGroup()
        found[rank] = predict(
            workloads[rank],  # type: ignore[arg-type]
            models,
            group,
            runtime,
            lambda stream, part: seen.append(stream),
        )

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted(s for work in workloads for s in work.asked) == list(range(STREAMS))
    wanted = np.repeat(np.arange(STREAMS), np.arange(1, STREAMS + 1))
    for predictions in found:
        assert predictions is not None
        assert np.array_equal(predictions["index"], wanted)
        assert predictions["loss"].dtype == np.float32
        assert np.array_equal(predictions["loss"], wanted)


def test_each_replica_has_a_model_of_its_own() -> None:
    used: dict[int, set[int]] = {}

    class Spy(Streams):
        def predict(self, model: nn.Module, stream: int, device: torch.device) -> Mapping[str, NDArray[Any]]:
            used.setdefault(id(model), set()).add(stream)
            return super().predict(model, stream, device)

    models: list[nn.Module] = [nn.Identity(), nn.Identity(), nn.Identity()]
    predict(Spy(), models, WorkerGroup(), replicas_of(3))  # type: ignore[arg-type]
    assert [used[id(model)] for model in models] == [{0, 3, 6}, {1, 4}, {2, 5}]


def test_arrays_may_stay_on_the_device_until_the_end() -> None:
    """Nothing is fetched stream by stream, unless somebody looks at every stream."""
    events: list[str] = []

    class Held(torch.Tensor):
        def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            events.append("fetched")
            return self.as_subclass(torch.Tensor)

    class OnDevice(Streams):
        def predict(self, model: nn.Module, stream: int, device: torch.device) -> Mapping[str, Any]:
            events.append("predicted")
            part = super().predict(model, stream, device)
            return {**part, "loss": torch.from_numpy(part["loss"]).as_subclass(Held)}

    said = predict(OnDevice(), [nn.Identity()], WorkerGroup(), replicas_of(1))  # type: ignore[arg-type]
    assert events == ["predicted"] * STREAMS + ["fetched"] * STREAMS
    assert isinstance(said["loss"], np.ndarray)
    plain = predict(Streams(), [nn.Identity()], WorkerGroup(), replicas_of(1))  # type: ignore[arg-type]
    assert said.same_as(plain)
    events.clear()
    seen: dict[int, Any] = {}
    predict(OnDevice(), [nn.Identity()], WorkerGroup(), replicas_of(1), seen.__setitem__)  # type: ignore[arg-type]
    assert events == ["predicted", "fetched"] * STREAMS
    assert all(isinstance(part["loss"], np.ndarray) for part in seen.values())
