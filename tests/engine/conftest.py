from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import gpu, runtime
from rayexp.engine.group import WorkerGroup
from rayexp.engine.trainer import Trainer
from rayexp.workloads import open_workload

SMALL: dict[str, dict[str, Any]] = {
    "image_classification": {
        "data": {"name": "shapes", "max_train_samples": 120, "max_val_samples": 40, "image_size": 32},
        "model": {"name": "mobilenet_v3_small"},
        "batch_size": 32,
        "shards": 4,
    },
    "language_model": {
        "workload": "language_model",
        "data": {"name": "python_docs", "max_train_tokens": 3000, "max_val_tokens": 600, "bptt": 20},
        "model": {"name": "lstm", "emsize": 16, "nhid": 16, "nlayers": 2, "dropout": 0.2},
        "batch_size": 16,
        "shards": 8,
        "lr": 1.0,
        "optimizer": {"momentum": 0, "clip": 0.25},
        "schedule": {"name": "plateau", "gamma": 0.25},
    },
}
OWN_MODEL = Path(__file__).parents[2] / "examples" / "own_model.py"
OWN_NET: dict[str, Any] = {
    "model": {"name": f"{OWN_MODEL}:SmallNet", "width": 4, "depth": 2, "dropout": 0.2},
    "code": [str(OWN_MODEL)],
}


@pytest.fixture(params=list(SMALL))
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., ExperimentConfig]:
    """A small configuration of each workload; keywords replace its keys."""

    def make(**changes: Any) -> ExperimentConfig:
        tree = {**SMALL[request.param], "storage_path": str(tmp_path / "runs"), **changes}
        return parse(tree, ExperimentConfig, "test")

    return make


@pytest.fixture
def light(small: Callable[..., ExperimentConfig]) -> Callable[..., ExperimentConfig]:
    """`small`, its images with a network of two convolutions: for what a model's layers have no part in."""

    def make(**changes: Any) -> ExperimentConfig:
        images = small().workload == "image_classification"
        return small(**({**OWN_NET, **changes} if images else changes))

    return make


@pytest.fixture
def session() -> Callable[[ExperimentConfig], Trainer]:
    def make(config: ExperimentConfig) -> Trainer:
        here = runtime.configure(config, torch.device("cpu"), config.shards)
        return Trainer(config, open_workload(config), WorkerGroup(), here)

    return make


@pytest.fixture
def static() -> Iterator[Callable[..., Trainer]]:
    """A trainer whose steps are static, or with `static=False` ordinary ones of PyTorch's operations alone."""
    with contextlib.ExitStack() as stack:

        def make(config: ExperimentConfig, static: bool = True) -> Trainer:
            data = config.data.model_copy(update={"max_train_tokens": 1500})  # five windows, the last one shorter
            config = config.model_copy(update={"cpu_kernels": False, "data": data})
            here = runtime.configure(config, torch.device("cpu"), config.shards, static=static)
            return Trainer(config, open_workload(config), WorkerGroup(), stack.enter_context(here))

        yield make


class FakeCapture:
    """Which streams take part in a capture, by CUDA's rules for captures on several streams."""

    def __init__(self, origin: Any) -> None:
        self.members, self.open = [origin], list[Any]()

    def waits(self, stream: Any, other: Any) -> None:
        if other not in self.members:
            assert stream not in self.members, "a stream that is captured waits for one that is not"
            return
        if stream not in self.members:
            self.members.append(stream)
        if other in self.open:
            self.open.remove(other)

    def enters(self, stream: Any) -> None:
        assert stream in self.members, "a stream is used in a capture that it has not joined"
        if stream is not self.members[0] and stream not in self.open:
            self.open.append(stream)

    def ends(self) -> None:
        assert not self.open, "a stream that took part is not waited for"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Stands for what the engine uses of torch.cuda: streams note what waits for what and keep the rules of a capture,
    and a graph computes nothing. `capture` is the capture that is under way, None between captures; `broken`: the next
    one fails at its end. `free` and `peak`: bytes of memory that are free, and that were taken at most."""
    fake = SimpleNamespace(broken=False, capture=None, captured=0, free=80 << 30, peak=8 << 20)

    class Stream:
        made = 0

        def __init__(self, *args: Any) -> None:
            Stream.made += 1
            self.name, self.waits, self.device = f"stream {Stream.made}", list[str](), torch.device("cuda", 0)

        def wait_stream(self, other: Stream) -> None:
            self.waits.append(other.name)
            if fake.capture is not None:
                fake.capture.waits(self, other)

        def wait_event(self, event: object) -> None:
            assert fake.capture is None, "an event of before is waited for in a capture"
            self.waits.append("event")

    first = Stream()

    class Streams(threading.local):  # a thread has a present stream of its own
        def __init__(self) -> None:
            self.stack = [first]

    present = Streams()

    @contextlib.contextmanager
    def stream(which: Stream) -> Iterator[None]:
        if fake.capture is not None:
            fake.capture.enters(which)
        present.stack.append(which)
        try:
            yield
        finally:
            present.stack.pop()

    class Graph:
        """A failed capture raises at its end, and leaves its stream behind (torch.cuda.graph)."""

        def __init__(self, graph: object, pool: object, stream: Stream, capture_error_mode: str) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            assert fake.capture is None, "a capture within another one"
            present.stack.append(self.stream)
            fake.capture, fake.captured = FakeCapture(self.stream), fake.captured + 1

        def __exit__(self, kind: object, *rest: object) -> None:
            capture, fake.capture = fake.capture, None
            if kind is not None or fake.broken:
                raise RuntimeError("CUDA error: the capture was invalidated")
            capture.ends()
            present.stack.pop()

    class CUDAGraph:
        def __init__(self) -> None:
            self.registered, self.replays, self.resets = list[object](), 0, 0

        def register_generator_state(self, generator: object) -> None:
            self.registered.append(generator)

        def pool(self) -> int:
            return 1

        def replay(self) -> None:
            self.replays += 1

        def reset(self) -> None:
            self.resets += 1

    def synchronize(*args: object) -> None:
        assert fake.capture is None, "the device is waited for in a capture"

    class Generator:
        """The global one."""

        swapped = 0

        def clone_state(self) -> str:
            return "as before"

        def graphsafe_set_state(self, state: str) -> None:
            assert state == "as before"
            self.swapped += 1

    fake.default_generators = [Generator()]
    fake.graph, fake.CUDAGraph, fake.Stream, fake.synchronize = Graph, CUDAGraph, Stream, synchronize
    fake.stream, fake.current_stream = stream, lambda *args: present.stack[-1]
    fake.set_stream = lambda which: present.stack.append(which)
    fake.Event = lambda **kwargs: SimpleNamespace(record=lambda: None)
    fake.device = lambda device: contextlib.nullcontext()
    fake.mem_get_info = lambda device: (fake.free, 80 << 30)
    fake.reset_peak_memory_stats = lambda device: setattr(fake, "peak", min(fake.peak, 8 << 20))
    fake.max_memory_allocated, fake.memory_allocated = lambda device: fake.peak, lambda device: 5 << 20
    for name, value in vars(fake).items():
        if hasattr(torch.cuda, name):
            monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    gpu.stream_for.cache_clear()
    yield fake
    gpu.stream_for.cache_clear()
