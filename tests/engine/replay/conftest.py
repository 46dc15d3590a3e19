"""A CUDA graph without a GPU: a captured step is recorded operation by operation, and only these run again."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import TensorWeakRef

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import batch_norm, gpu, runtime
from rayexp.engine.group import WorkerGroup
from rayexp.engine.runtime import Runtime
from rayexp.engine.trainer import Trainer
from rayexp.workloads import open_workload

CPU = torch.device("cpu")
aten = torch.ops.aten
READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
HOST_VALUES = (aten.lift_fresh, aten.set_, aten.resize_)
NO_KERNEL = re.compile(r"aten\.(new_)?empty")
EXAMPLES = Path(__file__).parents[3] / "examples"
OWN = """
import torch
from torch import nn

from own_workload import Regression

class Weighed(Regression):
    weights = None

    def losses(self, outputs, targets):
        if self.weights is None or len(self.weights) != len(targets):
            self.weights = torch.linspace(0.5, 1.5, len(targets))
        return super().losses(outputs, targets) * self.weights

class RMSprop:
    state = ("square_avg",)
    def update(self, params, gradient, state, lr, step, weight_decay):
        gradient.add_(params, alpha=weight_decay)
        state["square_avg"].mul_(0.9).addcmul_(gradient, gradient, value=0.1)
        params.sub_(lr * gradient / (state["square_avg"].sqrt() + 1e-8) / (1 + step).sqrt())

def halved(step):
    return 0.5 ** (step % 3)

class Masked(nn.Module):
    # As in pytorch/examples word_language_model: the mask is kept until a window has another length.
    def __init__(self, vocabulary):
        super().__init__()
        self.encoder = nn.Embedding(vocabulary, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0)
        self.decoder = nn.Linear(8, vocabulary)
        self.mask = None

    def forward(self, words):
        if self.mask is None or len(self.mask) != len(words):
            self.mask = nn.Transformer.generate_square_subsequent_mask(len(words), device=words.device)
        return self.decoder(self.layer(self.encoder(words), src_mask=self.mask))

def averaging(num_classes):
    norms = nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, track_running_stats=False)
    layers = nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 3), norms[1], nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, num_classes))
"""


class Replay(TorchDispatchMode):
    """Work that was recorded once, operation by operation, and runs again without its Python. The rules are a CUDA
    graph's (see gpu.Graph for the arguments):

    - recording computes nothing: what the work had written is put back, what it had made is of no use;
    - memory that the recording took holds nothing of use when a replay begins (it is filled with NaN), and what of it
      nobody refers to after a replay belongs to others (filled once more);
    - other memory must still be there;
    - no operation asks for a value, none takes one from the host, and draws come from registered generators.
    """

    def __init__(self, work: Callable[[], object], generators: Iterable[torch.Generator], pool: object) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.taken: dict[int, Tensor] = {}  # by address of its memory: what the recording has made
        self._others: dict[int, Tensor] = {}  # and what was there before
        self._owners: dict[int, list[TensorWeakRef]] = {}
        self._generators = list(generators)
        before = [generator.get_state() for generator in self._generators]
        self._contents: dict[int, Tensor] = {}
        try:
            with self:
                work()
            for generator, state in zip(self._generators, before, strict=True):
                generator.set_state(state)  # after a failure they are of no use, as on a GPU
        finally:
            for where, content in self._contents.items():
                self._others[where].copy_(content)
            self._contents.clear()
            for tensor in self.taken.values():
                spoil(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._refuse(func, leaves, tensors)
        for tensor in tensors:
            self._know(tensor)
        kept = tree_map_only(Tensor, torch.detach, (args, kwargs))
        given = {address(tensor) for tensor in tensors}
        made = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        fresh = [result for result in results if address(result) not in given]
        for result in results:
            if address(result) and address(result) not in self._others:
                self.taken.setdefault(address(result), whole(result))
                self._owners.setdefault(address(result), []).append(TensorWeakRef(result))
        computes = not (func.is_view or torch.Tag.inplace_view in func.tags or NO_KERNEL.match(str(func)))
        if computes:
            assert not fresh or len(fresh) == len(results), func
            self.operations.append((func, *kept, [result.detach() for result in fresh]))
        return made

    def _refuse(self, func: Any, leaves: list[Any], tensors: list[Tensor]) -> None:
        index = func.overloadpacket in INDEXING
        if any(tag in func.tags for tag in READS) and not index:
            raise RuntimeError(f"{func} asks for a value")
        if index and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:]):
            raise RuntimeError(f"{func} asks how much is masked")
        if func.overloadpacket in HOST_VALUES:
            raise RuntimeError(f"{func} takes what the host has")
        seeds = {generator.initial_seed() for generator in self._generators}  # PyTorch hands on other objects
        if any(isinstance(leaf, torch.Generator) and leaf.initial_seed() not in seeds for leaf in leaves):
            raise RuntimeError(f"{func} draws from a generator that is not registered")

    def _know(self, tensor: Tensor) -> None:
        """Before its first use, note what is in memory that the recording has not taken."""
        where = address(tensor)
        if where and where not in self.taken:
            if where not in self._others:
                self._others[where] = whole(tensor)
                self._contents[where] = self._others[where].clone()
            self._owners.setdefault(where, []).append(TensorWeakRef(tensor))

    def _alive(self, where: int) -> bool:
        return any(owner() is not None for owner in self._owners[where])

    def __call__(self) -> None:
        for where, tensor in self._others.items():
            assert self._alive(where), f"a tensor that the graph reads is gone ({tensor.nbytes} bytes)"
        for tensor in self.taken.values():
            spoil(tensor)
        with torch.no_grad():
            for func, args, kwargs, results in self.operations:
                made = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for result, new in zip(results, made, strict=False):
                    result.copy_(new)
        for where, tensor in self.taken.items():
            if not self._alive(where):
                spoil(tensor)


def address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 where it has none."""
    return tensor.untyped_storage().data_ptr()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor's memory, in its own type."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.element_size(),))


def spoil(tensor: Tensor) -> None:
    """Fill with what shows in every result."""
    kind = tensor.dtype
    tensor.fill_(torch.nan if kind.is_floating_point else True if kind is torch.bool else torch.iinfo(kind).max)


@pytest.fixture
def replay() -> type[Replay]:
    """The class."""
    return Replay


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Trainer]]:
    """A trainer that goes a GPU's ways: replicas one after another, and batch norms of equal shards folded."""
    true = batch_norm._forward

    def forward(norm: Any, draws: Any) -> Any:
        one_by_one = true(norm, draws)
        if norm.running_mean is None:
            return one_by_one
        return lambda x: batch_norm.folded(norm, len(draws.sizes), x) if len({*draws.sizes}) == 1 else one_by_one(x)

    monkeypatch.setattr(batch_norm, "_forward", forward)
    monkeypatch.setattr(gpu, "side_by_side", lambda streams, tasks: [task() for task in tasks])
    monkeypatch.setattr(Runtime, "graph", lambda here, *args: Replay(*args))
    # What oneDNN's LSTM leaves to its backward pass is of use only where it was made.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    (tmp_path / "parts.py").write_text(OWN)
    code = [str(file) for file in (*EXAMPLES.glob("own_*.py"), tmp_path / "parts.py")]
    fixed = {"epochs": 3, "cpu_kernels": False, "scaling": {"lanes": 1}, "code": code, "storage_path": str(tmp_path)}
    with contextlib.ExitStack() as stack:

        def make(tree: dict[str, Any], replicas: int = 1, group: WorkerGroup | None = None, **changes: Any) -> Trainer:
            config = parse({**fixed, **tree, **changes}, ExperimentConfig, "test")
            here = stack.enter_context(runtime.configure(config, CPU, config.shards, static=True))
            here = dataclasses.replace(here, streams=(None,) * replicas if replicas > 1 else ())
            one = Trainer(config, open_workload(config), group or WorkerGroup(), here)
            if config.data.resident is True:
                one.workload.resident(CPU)
            return one

        yield make
