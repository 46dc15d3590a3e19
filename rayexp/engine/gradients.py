"""A model's tensors as views of flat buffers, and the layout of the row that is reduced.

    params   fp32[P]   every trainable parameter, decayed ones first
    stats    fp32[B]   running mean and variance of every batch norm
    row      fp32[R]   what a shard contributes: [tail 5 | batch statistics B | gradient P | padding]

Replicas of the model (one a lane) share `params`; each has a row of its own, and autograd and batch norm write
straight into it. So gradients, batch statistics, loss and counts ride through one and the same tree.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rayexp.errors import UserError

TAIL = ("loss", "count", "shards", "stop", "save")
"""The tail of a row: sum of the loss, number of loss terms, number of shards, and the workers that
wish to stop or to save."""
_ALIGN = 16  # elements, a cache line


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies in its buffer."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    size: int
    rank: int = 0
    """Position in the model's own order."""

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor as a view of the buffer."""
        return torch.as_strided(buffer, self.shape, self.stride, buffer.storage_offset() + self.start)


class ParameterLayout:
    """The slots of a model's parameters and batch-norm statistics, and the length of a row."""

    def __init__(self, model: nn.Module, shards: int, decay_norm_and_bias: bool = True) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        decayed = [(n, p) for n, p in named if decay_norm_and_bias or p.ndim > 1]
        taken = {n for n, _ in decayed}
        rest = [(n, p) for n, p in named if n not in taken]
        # Every tensor starts on a cache line, and every number of workers that divides the shards cuts it evenly.
        self.unit = _ALIGN * shards
        self.ranks = {n: i for i, (n, _) in enumerate(named)}
        self.params: list[Slot] = []
        end = self._place(decayed, 0, self.params)
        self.decayed = end
        self.size = self._place(rest, end, self.params)
        norms = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        buffers = [(f"{n}.{b}", getattr(m, b)) for n, m in norms for b in ("running_mean", "running_var")]
        self.stats: list[Slot] = []
        self.stats_size = self._place(buffers, 0, self.stats)
        self.momentum = [(n, 0.1 if m.momentum is None else m.momentum) for n, m in norms]
        self.head = math.ceil((_ALIGN + self.stats_size) / self.unit) * self.unit
        self.row = self.head + self.size

    def _place(self, named: Sequence[tuple[str, Tensor]], start: int, slots: list[Slot]) -> int:
        for name, tensor in named:
            if tensor.dtype != torch.float32:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(f"model: {name} is {kind}; allowed: float32 (precision makes faster products of it)")
            # A permuted but gapless tensor (channels_last) keeps its strides; anything else becomes contiguous.
            dense = tensor.is_contiguous() or (
                tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            )
            stride = tensor.stride() if dense else tensor.contiguous().stride()
            rank = self.ranks.get(name, 0)
            slots.append(Slot(name, tuple(tensor.shape), tuple(stride), start, tensor.numel(), rank))
            start += math.ceil(tensor.numel() / self.unit) * self.unit
        return start

    def touched(self, rows: Mapping[str, Tensor]) -> list[Touched]:
        """Parts of a row of which only some rows are touched, by parameter name; in the order of the buffer."""
        found = []
        stops = [*(s.start for s in self.params[1:]), self.size]
        for i, (slot, stop) in enumerate(zip(self.params, stops, strict=True)):
            if slot.name in rows:
                found.append(Touched(i, self.head + slot.start, self.head + stop, slot.shape, rows[slot.name]))
        return found

    def gradient(self, row: Tensor) -> Tensor:
        """fp32[P], a view."""
        return row[self.head : self.head + self.size]

    def batch_stats(self, row: Tensor) -> Tensor:
        """fp32[B], a view."""
        return row[_ALIGN : _ALIGN + self.stats_size]

    def rest(self, row: Tensor) -> Tensor:
        """All before the gradient (tail, batch statistics), a view."""
        return row[: self.head]

    def tail(self, row: Tensor) -> Tensor:
        """fp32[5], a view: see TAIL."""
        return row[: len(TAIL)]


class Master:
    """The weights and running statistics of a run: one buffer each, and replicas of the model that look into them."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, layout: ParameterLayout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.model = model.to(device)
        self.params = torch.zeros(layout.size, device=device)
        self.stats = torch.zeros(layout.stats_size, device=device)
        self.keep = torch.ones(layout.stats_size, device=device)
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for buffer, slots in ((self.params, layout.params), (self.stats, layout.stats)):
            for slot in slots:
                slot.view(buffer).copy_(tensors[slot.name])
        momentum = {f"{n}.{b}": m for n, m in layout.momentum for b in ("running_mean", "running_var")}
        for slot in layout.stats:
            slot.view(self.keep).fill_(1 - momentum[slot.name])

    def eval_model(self) -> nn.Module:
        """A model in eval mode that looks into the master: always the present weights and running statistics."""
        model = copy.deepcopy(self.model)
        for slot in self.layout.params:
            module, name = _owner(model, slot.name)
            getattr(module, name).data = slot.view(self.params)
        for slot in self.layout.stats:
            module, name = _owner(model, slot.name)
            module._buffers[name] = slot.view(self.stats)
        return model.eval()

    def update_stats(self, row: Tensor, shards: float) -> None:
        """running = keep * running + (1 - keep) * (mean of the shards' batch statistics)."""
        if self.layout.stats_size:
            mean = self.layout.batch_stats(row) / shards
            self.stats.lerp_(mean, 1 - self.keep)

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Every tensor of the model's state_dict, as views; `num_batches_tracked` is the optimizer step."""
        views = {s.name: s.view(self.params) for s in self.layout.params}
        views |= {s.name: s.view(self.stats) for s in self.layout.stats}
        named = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        # A tensor of several names (a shared module) lies in the buffers under the first of them.
        held = {id(tensor): views[name] for name, tensor in named.items() if name in views}
        found = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name.endswith("num_batches_tracked"):
                found[name] = torch.tensor(step)
            else:
                found[name] = held.get(id(tensor), tensor.detach())
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors (as `tensors` names them) into the buffers.

        Raises:
            KeyError, RuntimeError: a tensor is missing or has another shape.
        """
        for buffer, slots in ((self.params, self.layout.params), (self.stats, self.layout.stats)):
            for slot in slots:
                slot.view(buffer).copy_(tensors[slot.name])

    def named(self, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Views of a buffer laid out like `params` (a momentum, a gradient) under the parameters' names."""
        for slot in self.layout.params:
            yield slot.name, slot.view(buffer)


@dataclass(frozen=True, slots=True)
class Touched:
    """A parameter's part of a row, elements [start, stop) with its padding, that is zero but for some rows of its
    matrix."""

    parameter: int
    start: int
    stop: int
    shape: tuple[int, ...]
    rows: Tensor

    def matrix(self, row: Tensor, head: int = 0) -> Tensor:
        """fp32[n, width], a view of a row, or of a buffer that lacks a row's head of so many elements."""
        start = self.start - head
        return row[start : start + math.prod(self.shape)].view(self.shape)


class GradientBuffer:
    """A row and the views of it that a replica writes through."""

    def __init__(self, layout: ParameterLayout, device: torch.device) -> None:
        self.tensor = torch.zeros(layout.row, device=device)
        self.rest = layout.rest(self.tensor)
        self._dirty: Sequence[Touched] = ()
        self.gradients = [slot.view(layout.gradient(self.tensor)) for slot in layout.params]
        # .data: batch norm saves its buffers for backward, and views that share a version counter would disturb it.
        self.stats = [slot.view(layout.batch_stats(self.tensor)).data for slot in layout.stats]

    def clear(self, touched: Sequence[Touched]) -> None:
        """Zero what comes before the gradients, and these parts, which will be written only where they say so."""
        self.rest.zero_()
        for last in self._dirty:
            last.matrix(self.tensor).index_fill_(0, last.rows, 0.0)
        self._dirty = touched


class ReplicaModel:
    """A model for training whose weights are the master's and which leaves what it computes in a row.

    Gradients accumulate in the row. A module may put a weight's gradient there by itself, and hand None to autograd:
    into `weight.into`, over what is there where `weight.grad` is None (which it then sets to `into`), else added to it
    as a whole, since it may be another shard's. Where `into` is None, `weight.grad` is this shard's alone.
    Batch norm leaves the batch's own mean and (unbiased) variance there: with momentum 1, "running" means "last".
    """

    def __init__(self, master: Master) -> None:
        self.module = copy.deepcopy(master.model).train()
        layout = master.layout
        owners = [_owner(self.module, slot.name) for slot in layout.params]
        self._parameters: list[nn.Parameter] = [getattr(module, name) for module, name in owners]
        for parameter, slot in zip(self._parameters, layout.params, strict=True):
            parameter.data = slot.view(master.params)
        self._buffers = [_owner(self.module, slot.name) for slot in layout.stats]
        for module in self.module.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 1.0
                module.num_batches_tracked = None

    def watch(self, passed: Callable[[int], None]) -> None:
        """Call `passed(i)` whenever a backward pass has completed the gradient of parameter i, whether autograd or a
        module has put it there."""
        # As DistributedDataParallel does; held, since a tensor refers to its accumulator but weakly.
        self._accumulators = [p.view_as(p).grad_fn.next_functions[0][0] for p in self._parameters]  # type: ignore[union-attr]
        for i, accumulator in enumerate(self._accumulators):
            accumulator.register_hook(functools.partial(self._completed, passed, i))  # type: ignore[union-attr]

    def bind(self, row: GradientBuffer, zeroed: Container[int] | None) -> None:
        """Write into this row from now on.

        Args:
            zeroed: parameters whose gradients in the row are zero. The others are written over by the next pass, which
                saves zeroing them and adding to zeros; `finish_pass` must follow it. None: all are, and add up.
        """
        self._row = row
        for i, (parameter, gradient) in enumerate(zip(self._parameters, row.gradients, strict=True)):
            parameter.grad = gradient if zeroed is None or i in zeroed else None
            parameter.into = None if zeroed is None else gradient  # type: ignore[attr-defined]
        for (module, name), stat in zip(self._buffers, row.stats, strict=True):
            module._buffers[name] = stat

    def finish_pass(self) -> None:
        """A pass has ended: zero the gradients of parameters that it did not use."""
        for parameter, gradient in zip(self._parameters, self._row.gradients, strict=True):
            parameter.uses = 0  # type: ignore[attr-defined]
            if parameter.grad is None:
                parameter.grad = gradient.zero_()

    def _completed(self, passed: Callable[[int], None], index: int, *_: object) -> None:
        parameter, gradient = self._parameters[index], self._row.gradients[index]
        if parameter.grad is not gradient and parameter.grad is not None:
            parameter.grad = gradient.copy_(parameter.grad)
        passed(index)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor of a dotted name, and the name's last part."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last
