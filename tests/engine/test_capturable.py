"""What a step does while it is captured is legal in a CUDA graph: nothing asks the device for a value, and nothing
comes from the host. Found out without a GPU.

`Watch` looks at every operation of a capture. It is used twice: on the static step of a CPU, backward passes included,
and on tensors that claim to lie on a GPU and hold no numbers (PyTorch's FakeTensorMode), where the code takes its ways
for a GPU. There the backward passes of PyTorch itself are left out, which need a GPU even for such tensors.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import gpu, passes, programs, runtime
from rayexp.engine.gradients import ReplicaModel
from rayexp.engine.group import WorkerGroup
from rayexp.engine.programs import Program, Programs
from rayexp.engine.runtime import Runtime
from rayexp.engine.settings import Settings
from rayexp.engine.step import ControlFlags
from rayexp.engine.trainer import Trainer
from rayexp.workloads import open_workload

GPU = torch.device("cuda", 0)
READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
TEXT = {"emsize": 16, "nhid": 16, "nlayers": 2, "dropout": 0.2}
IMAGES: dict[str, Any] = {
    "data": {"name": "shapes", "max_train_samples": 24, "max_val_samples": 8, "image_size": 32},
    "model": {"name": "resnet18"},
    "batch_size": 8,
    "shards": 2,
}
WORDS: dict[str, Any] = {
    "workload": "language_model",
    "data": {"name": "python_docs", "max_train_tokens": 900, "max_val_tokens": 600, "bptt": 10},
    "batch_size": 8,
    "shards": 2,
    "optimizer": {"momentum": 0, "clip": 0.25},
}
slow = pytest.mark.slow
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet18 bf16": {**IMAGES, "precision": "bf16", "label_smoothing": 0.1, "optimizer": {"clip": 1.0}},
    "resnet18 staged": {**IMAGES, "data": {**IMAGES["data"], "resident": False, "augment": None}},
    "resnet18 ddp": {**IMAGES, "precision": "bf16", "reduction": "ddp"},
    "mobilenet pad": {
        **IMAGES,
        "model": {"name": "mobilenet_v3_small"},
        "data": {**IMAGES["data"], "augment": {"pad": 2}},
    },
    "resnet18 adamw": {
        **IMAGES,
        "precision": "tf32",
        "optimizer": {"name": "adamw", "clip": 1.0, "decay_norm_and_bias": False},
    },
    "mobilenet ddp": {**IMAGES, "model": {"name": "mobilenet_v3_small"}, "reduction": "ddp"},
    "lstm": {**WORDS, "model": {"name": "lstm", **TEXT}},
    "lstm ddp": {**WORDS, "model": {"name": "lstm", **TEXT}, "precision": "tf32", "reduction": "ddp"},
    "gru bf16": {**WORDS, "model": {"name": "gru", **TEXT}, "precision": "bf16", "optimizer": {"momentum": 0.9}},
    "rnn": {**WORDS, "model": {"name": "rnn_tanh", **TEXT}, "optimizer": {"name": "adamw"}},
    "lstm tied": {**WORDS, "model": {"name": "lstm", **TEXT, "tied": True}, "precision": "bf16"},
    "transformer": {
        **WORDS,
        "model": {"name": "transformer", **TEXT, "nhead": 2, "context": 4},
        "precision": "bf16",
        "optimizer": {"name": "adamw", "clip": 1.0},
    },
}
FAMILIES["transformer ddp"] = {**FAMILIES["transformer"], "precision": "fp32", "reduction": "ddp"}
QUICK = ("resnet18 bf16", "resnet18 ddp", "lstm", "transformer")
NAMES = [pytest.param(name, marks=[slow] * (name not in QUICK)) for name in FAMILIES]
NO_KERNEL = re.compile("empty|_unsafe_view")
MOST = {"resnet18 bf16": 610, "lstm": 126, "lstm ddp": 82, "transformer": 640}
"""Operations of a captured step that are a kernel on a GPU, at most. Each costs one or two microseconds there, and a
step of ResNet-18 is to take less than six milliseconds."""
MOST_FORWARD = {"resnet18 bf16": 400, "resnet18 ddp": 460}
"""The same on a GPU's ways, without the backward passes."""


class Watch(TorchDispatchMode):
    """Notes the operations of a capture that no graph can hold.

    Args:
        capturing: whether a capture is under way.
        device: of the captured tensors; None: whatever there is, so that tensors of the host are not told from others.
    """

    def __init__(self, capturing: Callable[[], bool], device: torch.device | None = None) -> None:
        super().__init__()
        self.capturing, self.device = capturing, device
        self.operations, self.kernels, self.faults = 0, 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.capturing():
            self.operations += 1
            self.kernels += func.namespace == "aten" and not func.is_view and not NO_KERNEL.search(str(func))
            if why := self.fault(func, tree_leaves((args, kwargs))):
                self.faults.append(f"{func} {why}")
        return func(*args, **(kwargs or {}))

    def fault(self, func: Any, leaves: list[Any]) -> str:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        index = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        if any(tag in func.tags for tag in READS) and not index:
            return "asks the device for a value"
        if func is torch.ops.aten.lift_fresh.default:
            return "makes a tensor of values of the host"
        if index and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:]):
            return "asks the device how much is masked"
        devices = [tensor.device for tensor in tensors] + [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        if self.device is not None and any(device.type != self.device.type for device in devices):
            return "has to do with the host's memory"
        return ""


# ---------------------------------------------------------------------- on a CPU


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Looks at the captures of static steps on a CPU."""
    under_way = [False]

    def captured(_: Programs, program: Program, half: str, work: Callable[[], None]) -> Callable[[], object]:
        def watch() -> None:
            under_way[0] = True
            try:
                work()
            finally:
                under_way[0] = False

        return watch

    monkeypatch.setattr(Programs, "_captured", captured)
    with Watch(lambda: under_way[0]) as watch:
        yield watch


def two_steps(one: Trainer) -> None:
    """The first as it stands, the second captured."""
    for number in range(2):
        one.stepper.launch(1, number, number, 0.1, ControlFlags())
    assert one.stepper.capture == "graph", one.stepper.capture


@pytest.mark.parametrize("family", NAMES)
def test_a_static_step_asks_for_no_value(watched: Watch, static: Callable[..., Trainer], family: str) -> None:
    """Its backward passes, too. One replica: a mode belongs to a thread."""
    config = parse({"epochs": 1, "scaling": {"lanes": 1}, **FAMILIES[family]}, ExperimentConfig, "test")
    two_steps(static(config))
    assert watched.faults == []
    assert watched.operations > 100
    assert watched.kernels <= MOST.get(family, math.inf)


@pytest.mark.parametrize("family", NAMES)
def test_evaluation_asks_for_no_value_before_its_end(static: Callable[..., Trainer], family: str) -> None:
    one = static(parse({"epochs": 1, **FAMILIES[family]}, ExperimentConfig, "test"))
    with Watch(lambda: True) as watch, torch.inference_mode():
        for stream in range(one.workload.val_streams()):
            one.workload.predict(one.eval_models[0], stream, torch.device("cpu"))
    # Nothing is captured here, so what comes from the host may come.
    assert [fault for fault in watch.faults if "asks the device" in fault] == []
    assert watch.operations > 20


# ---------------------------------------------------------------------- on tensors that claim to lie on a GPU


class Tracing:
    """Traces steps on a GPU that is not there.

    Attributes:
        watch: looks at the captures.
    """

    def __init__(self, cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        self.watch = Watch(lambda: cuda.capture is not None, GPU)
        self._mode, self._patch = FakeTensorMode(allow_non_fake_inputs=True), monkeypatch

    def trainer(self, tree: dict[str, Any]) -> Trainer:
        """A trainer on it. Use it within `on`."""
        config = parse({"epochs": 1, **tree}, ExperimentConfig, "test")
        workload = open_workload(config)
        model = workload.model()
        self._patch.setattr(workload, "model", lambda: model)
        streams = gpu.streams(GPU, runtime.replicas_of(config, config.shards, on_gpu=True))
        here = Runtime(GPU, 1, 1, None, Settings.now(), streams, True)
        with self.on():
            # What Module.to would do, which fake tensors refuse.
            self._patch.setattr(nn.Module, "to", lambda module, *args: module)
            for module in model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(empty_like(parameter)))
                for name, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, name, empty_like(buffer))
            one = Trainer(config, workload, WorkerGroup(), here)
        one.stepper._feeder = None  # a thread of its own would leave the mode
        one.stepper._watch_next = False  # which reads, before anything is captured
        return one

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Every tensor is a fake one."""
        with self._mode, self.watch:
            yield


class Unwatched(contextlib.nullcontext[None]):
    """In the place of a CaptureWatch, which compares values: fake tensors have none."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def counters(self, *args: object) -> list[Any]:
        return []

    def read(self) -> list[Tensor]:
        return []


def empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)


@pytest.fixture
def tracing(cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracing]:
    """PyTorch without a GPU refuses some things that need none for fake tensors; they are replaced here."""
    true = ReplicaModel.backward

    def backward(model: ReplicaModel, loss: Tensor, buffer: Any) -> None:
        assert loss.requires_grad
        monkeypatch.setattr(torch.autograd, "grad", lambda loss, of, allow_unused: [torch.empty_like(p) for p in of])
        true(model, loss, buffer)

    monkeypatch.setattr(ReplicaModel, "backward", backward)
    monkeypatch.setattr(programs, "CaptureWatch", Unwatched)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: False)
    generator = torch.Generator
    monkeypatch.setattr(passes.torch, "Generator", lambda device=None: generator())
    monkeypatch.setattr(Runtime, "download", lambda here, tensor: tensor)
    library = torch.library.Library("aten", "IMPL")
    for name in ("_fused_sgd_.tensor_lr", "_fused_adamw_.tensor_lr"):
        library.impl(name, lambda *args, **kwargs: None, "Meta")
    with torch.backends.cudnn.flags(enabled=False):  # PyTorch's own recurrent cells, which can be traced
        yield Tracing(cuda, monkeypatch)
    library._destroy()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
# PyTorch cannot trace its own cell of a GRU.
@pytest.mark.parametrize("family", [name for name in NAMES if name.values != ("gru bf16",)])
def test_a_step_on_a_gpu_stays_on_it(tracing: Tracing, cuda: SimpleNamespace, family: str) -> None:
    one = tracing.trainer(FAMILIES[family])
    with tracing.on():
        two_steps(one)
    assert tracing.watch.faults == []
    assert tracing.watch.operations > 100
    assert tracing.watch.kernels <= MOST_FORWARD.get(family, math.inf)
    assert cuda.captured == 2


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_replicas_that_do_not_fit_into_a_graph_are_fewer(tracing: Tracing, cuda: SimpleNamespace) -> None:
    """Each takes 3 MiB for a while."""
    cuda.free = 4 << 20
    one = tracing.trainer(FAMILIES["lstm"])
    with tracing.on():
        two_steps(one)
    assert len(one.stepper.passes.replicas) == 1
    assert cuda.captured == 2


# ---------------------------------------------------------------------- what Watch finds

LEGAL: dict[str, Callable[[Tensor], object]] = {
    "a number of Python": lambda x: x * 2 + 1,
    "filling": lambda x: x.fill_(3.0),
    "a chosen number": lambda x: torch.where(x > 0, x, 0.0),
    "masking": lambda x: x.masked_fill_(x > 0, 1.0),
    "new on the device": lambda x: torch.arange(4, device=x.device) + torch.zeros_like(x),
    "gathering": lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int64, device=x.device)),
}
READING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "set by a mask": lambda x: x.index_put_((x > 0,), x.sum()),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "bincount": lambda x: x.long().bincount(),
    "a new tensor": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
}
OF_THE_HOST: dict[str, Callable[[Tensor], object]] = {
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "to the device": lambda x: torch.ones(4).to(x.device),
    "a scalar tensor": lambda x: x * torch.ones(()),
    "an index": lambda x: x[torch.zeros(2, dtype=torch.int64)],
    "copied in": lambda x: x.copy_(torch.ones(4)),
}


def found(watch: Watch, work: Callable[[Tensor], object], device: torch.device) -> list[str]:
    """What `watch` finds in a piece of work on four numbers; on fake ones the work may be refused, too."""
    x = torch.ones(4, device=device)
    watch.faults.clear()
    with contextlib.suppress(RuntimeError), watch:
        work(x)
    return watch.faults


@pytest.mark.parametrize("name", list(LEGAL | READING | OF_THE_HOST))
def test_what_is_illegal_in_a_capture_is_found(tracing: Tracing, name: str) -> None:
    work = (LEGAL | READING | OF_THE_HOST)[name]
    on_cpu, on_gpu = Watch(lambda: True), Watch(lambda: True, GPU)
    assert bool(found(on_cpu, work, torch.device("cpu"))) is (name in READING)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert bool(found(on_gpu, work, GPU)) is (name not in LEGAL)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    "what",
    [lambda x: float(x.detach().sum()), lambda x: x + torch.ones(()), lambda x: x.cpu(), lambda x: x[x > 0]],
)
def test_a_model_that_does_such_a_thing_is_found(tracing: Tracing, what: Callable[[Tensor], Any]) -> None:
    one = tracing.trainer(FAMILIES["lstm"])
    with tracing.on():
        one.stepper.launch(1, 0, 0, 0.1, ControlFlags())
        for replica in one.stepper.passes.replicas:
            replica.model.module.encoder.register_forward_hook(lambda module, inputs, out: what(out) and None)
        with contextlib.suppress(Exception):
            one.stepper.launch(1, 1, 1, 0.1, ControlFlags())
    assert tracing.watch.faults
