"""engine/gpu.py on a fake torch.cuda: which stream waits for which, what a failed capture leaves behind, feeding."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from rayexp.engine import gpu
from rayexp.engine.runtime import Runtime
from rayexp.engine.settings import Settings
from rayexp.errors import UserError

GPU = torch.device("cuda", 0)


def test_streams_wait_for_what_was_before_and_are_waited_for(cuda: SimpleNamespace) -> None:
    present, two = cuda.current_stream(), (cuda.Stream(), cuda.Stream(), cuda.Stream())
    ran = gpu.side_by_side(two, [lambda: cuda.current_stream().name, lambda: cuda.current_stream().name])
    assert ran == [two[0].name, two[1].name]
    assert [one.waits for one in two] == [[present.name], [present.name], []]
    assert present.waits == ran
    assert cuda.current_stream() is present


def test_every_use_has_one_stream_as_long_as_the_process_lives(cuda: SimpleNamespace) -> None:
    """PyTorch has 32 of them: with others for every run, two uses would end up with one."""
    before = cuda.Stream.made
    for _ in range(10):
        streams = gpu.streams(GPU, 4)
        feeder = gpu.Feeder(lambda at: {}, following, GPU)
        gpu.Graph(lambda: None, (), None)
    assert gpu.streams(GPU, 8)[:4] == streams
    assert gpu.streams(GPU, 1) == ()
    assert cuda.Stream.made - before == 8 + 2
    assert feeder._stream not in gpu.streams(GPU, 8)


@pytest.mark.parametrize(("version", "told"), [("2.11.0", 2), ("2.13.1+cu130", 2), ("2.14.0", 0), ("2.15.0a0", 0)])
def test_a_graph_is_told_of_its_generators_where_it_does_not_find_them(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, version: str, told: int
) -> None:
    """PyTorch 2.14 finds them, and warns of every call."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    generators = [torch.Generator(), torch.Generator()]
    assert gpu.Graph(lambda: None, generators, None)._graph.registered == generators[:told]


def test_a_graph_is_captured_on_a_stream_of_its_own(cuda: SimpleNamespace) -> None:
    present, seen, two = cuda.current_stream(), [], gpu.streams(GPU, 2)

    def work() -> None:
        seen.append(cuda.current_stream())
        gpu.side_by_side(two, [lambda: seen.append(cuda.current_stream())] * 2)

    graph = gpu.Graph(work, (), None)
    assert len({id(stream) for stream in (*seen, present)}) == 4
    assert graph._graph.replays == 0
    graph()
    graph()
    assert (graph._graph.replays, len(seen)) == (2, 3)
    assert cuda.current_stream() is present


def test_a_failed_capture_names_the_reason_and_leaves_no_stream_behind(cuda: SimpleNamespace) -> None:
    present = cuda.current_stream()
    gpu.Graph(lambda: None, (), None)
    assert cuda.current_stream() is present
    assert cuda.default_generators[0].swapped == 0

    def work() -> None:
        raise RuntimeError("a value was asked for")

    with pytest.raises(RuntimeError, match="a value was asked for"):
        gpu.Graph(work, (), None)
    assert cuda.current_stream() is present
    cuda.broken = True
    with pytest.raises(RuntimeError, match="invalidated"):
        gpu.Graph(lambda: None, (), None)
    assert cuda.current_stream() is present


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, UserError, KeyboardInterrupt])
def test_a_failed_capture_is_cleaned_up_whatever_failed(cuda: SimpleNamespace, error: type[BaseException]) -> None:
    """The global generator can draw again, and the allocator may ask the graph for its streams ever after."""
    present, known = cuda.current_stream(), len(gpu._failed)

    def work() -> None:
        with cuda.stream(cuda.current_stream()):
            raise error("why")

    with pytest.raises(error, match="why"):
        gpu.Graph(work, (), None)
    assert cuda.current_stream() is present
    assert cuda.default_generators[0].swapped == 1
    assert [graph.resets for graph in gpu._failed[known:]] == [1]
    gpu.Graph(lambda: None, (), None)  # another capture may follow


STEPS, EPOCHS = 3, 2


def following(at: tuple[int, int]) -> tuple[int, int] | None:
    epoch, step = at
    if step + 1 < STEPS:
        return epoch, step + 1
    return (epoch + 1, 0) if epoch < EPOCHS else None


def test_a_feeder_brings_every_batch_in_order(cuda: SimpleNamespace) -> None:
    """From the start, and from within an epoch; what was fed ahead for nothing is dropped."""
    fed: list[tuple[int, int]] = []

    def feed(at: tuple[int, int]) -> Mapping[str, np.ndarray]:
        fed.append(at)
        return {"at": np.array(at)}

    feeder = gpu.Feeder(feed, following, torch.device("cpu"))
    wanted = [(epoch, step) for epoch in (1, 2) for step in range(STEPS)]
    for at in wanted:
        assert tuple(feeder.get(at)["at"].tolist()) == at
        feeder.rest()
        assert fed == wanted[: wanted.index(at) + 1 + gpu.AHEAD]
    feeder.get((1, 1))
    assert tuple(feeder.get((2, 1))["at"].tolist()) == (2, 1)
    assert tuple(feeder.get((2, 2))["at"].tolist()) == (2, 2)


def test_a_feeder_uses_memory_again_once_the_present_stream_has_done_with_it(cuda: SimpleNamespace) -> None:
    feeder = gpu.Feeder(lambda at: {"at": np.array(at)}, following, torch.device("cpu"))
    present = cuda.current_stream()
    given = feeder.get((1, 0))
    assert feeder._given is given
    assert feeder._stream.waits == [present.name]
    feeder.get((1, 1))
    assert feeder._given is not given
    assert feeder._stream.waits == [present.name] * 2
    assert present.waits == ["event"] * 2


def test_what_goes_wrong_in_feeding_is_raised(cuda: SimpleNamespace) -> None:
    def feed(at: tuple[int, int]) -> Mapping[str, np.ndarray]:
        if at == (1, 1):
            raise OSError("the disk is gone")
        return {"thread": np.array(threading.current_thread() is not threading.main_thread())}

    feeder = gpu.Feeder(feed, following, torch.device("cpu"))
    assert feeder.get((1, 0))["thread"]
    with pytest.raises(OSError, match="the disk is gone"):
        feeder.get((1, 1))


def test_the_peak_of_memory_is_the_whole_runs(cuda: SimpleNamespace) -> None:
    """A batch of another size is looked at by itself, which begins the allocator's books anew."""
    here = Runtime(GPU, 1, 1, None, Settings.now(), static=True)
    assert here.transient(lambda: setattr(cuda, "peak", 700 << 20)) == (None, 695 << 20)
    assert here.transient(lambda: setattr(cuda, "peak", 90 << 20)) == (None, 85 << 20)
    assert here.peak_memory()["device"] == 700 << 20
    cuda.peak = 800 << 20
    assert here.peak_memory()["device"] == 800 << 20
