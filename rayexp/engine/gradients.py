"""A model's tensors as views of flat buffers, and the gradient buffer, which is what the workers add up.

    params            fp32[P]   every trainable parameter, those with weight decay first
    stats             fp32[B]   running mean and variance of every batch norm
    gradient buffer   fp32[R]   what one shard or several contribute:
                                [scalars 4 | padding to 16 | batch statistics B | padding | gradient P]

All replicas of a model share `params`. Each writes into a gradient buffer of its own: autograd and batch norm
accumulate straight into its views. So one reduction adds gradients, batch statistics, loss and counts.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from rayexp.engine.batch_norm import BATCH_NORMS
from rayexp.engine.freezing import fixed
from rayexp.engine.gradient_copy import GradientCopy
from rayexp.engine.rounding import of_products
from rayexp.errors import UserError

SCALARS = ("loss", "count", "stop", "save")
LOSS, COUNT, STOP, SAVE = range(len(SCALARS))
"""The scalars at the start of a gradient buffer, each a sum over shards: the loss, the number of loss terms, and who
asks to stop or to save."""
_ALIGN = 16  # elements, a cache line


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies in a flat buffer.

    Attributes:
        name: dotted, as in the model's state_dict.
        shape: of the tensor.
        stride: in elements; contiguous, or channels_last for a weight in that format.
        start: offset of the first element in the buffer; a multiple of 16 * shards.
        size: number of elements.
        rank: position of the parameter in the order of the model's definition, from 0; 0 for batch-norm statistics.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    size: int
    rank: int = 0

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor as a view of the buffer."""
        return torch.as_strided(buffer, self.shape, self.stride, buffer.storage_offset() + self.start)


class ParameterLayout:
    """Where a model's parameters and batch-norm statistics lie in the flat buffers. Sizes are in elements.

    Attributes:
        params: a slot for each trainable parameter in `params` fp32[P], those with weight decay first.
        stats: a slot for each running mean and variance in `stats` fp32[B].
        size: P, padding included.
        decayed: weight decay applies to elements [0, decayed) of `params`.
        stats_size: B, padding included.
        head_size: where the gradient starts in a gradient buffer; a multiple of `unit`.
        buffer_size: R, the size of a gradient buffer.
        unit: every slot starts at a multiple of this, so that each number of workers that divides the shards cuts a
            buffer into equal parts on cache lines.
        ranks: position of each trainable parameter in the model's own order, by name.
        momentum: name and momentum (0 to 1) of each batch norm with running statistics; None: it averages over steps.

    Args:
        model: all its parameters and running statistics are float32.
        shards: logical shards of a batch.
        decay_norm_and_bias: whether parameters of one dimension decay too.

    Raises:
        UserError: a tensor is not float32.
    """

    def __init__(self, model: nn.Module, shards: int, decay_norm_and_bias: bool = True) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        decayed = [(n, p) for n, p in named if decay_norm_and_bias or p.ndim > 1]
        taken = {n for n, _ in decayed}
        others = [(n, p) for n, p in named if n not in taken]
        self.unit = _ALIGN * shards
        self.ranks = {n: i for i, (n, _) in enumerate(named)}
        self.params: list[Slot] = []
        end = self._append(decayed, 0, self.params)
        self.decayed = end
        self.size = self._append(others, end, self.params)
        norms = [(n, m) for n, m in model.named_modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None]
        buffers = [(f"{n}.{b}", getattr(m, b)) for n, m in norms for b in ("running_mean", "running_var")]
        self.stats: list[Slot] = []
        self.stats_size = self._append(buffers, 0, self.stats)
        self.momentum = [(n, m.momentum) for n, m in norms]
        self.head_size = math.ceil((_ALIGN + self.stats_size) / self.unit) * self.unit
        self.buffer_size = self.head_size + self.size

    def _append(self, named: Sequence[tuple[str, Tensor]], start: int, slots: list[Slot]) -> int:
        """Append a slot for each tensor, the first at `start`; returns where the next one would start."""
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
        """The parts of a gradient buffer that belong to these parameters, in the order of the buffer.

        Args:
            rows: int64[k] by parameter name, the rows of the parameter's matrix whose gradient may be non-zero.
        """
        found = []
        stops = [*(s.start for s in self.params[1:]), self.size]
        for i, (slot, stop) in enumerate(zip(self.params, stops, strict=True)):
            if slot.name in rows:
                start = self.head_size + slot.start
                found.append(Touched(i, start, self.head_size + stop, slot.shape, rows[slot.name]))
        return found

    def gradient(self, buffer: Tensor) -> Tensor:
        """The gradient in a gradient buffer: fp32[P], a view."""
        return buffer[self.head_size : self.head_size + self.size]

    def batch_stats(self, buffer: Tensor) -> Tensor:
        """The sums of the batch statistics in a gradient buffer: fp32[B], a view."""
        return buffer[_ALIGN : _ALIGN + self.stats_size]

    def head(self, buffer: Tensor) -> Tensor:
        """What comes before the gradient (scalars and batch statistics): fp32[head_size], a view."""
        return buffer[: self.head_size]

    def scalars(self, buffer: Tensor) -> Tensor:
        """The scalars of a gradient buffer: fp32[4], a view, in the order of SCALARS."""
        return buffer[: len(SCALARS)]


class Master:
    """The weights and running statistics of a run, in one flat buffer each.

    Attributes:
        layout: where tensors lie in the buffers.
        device: where the buffers lie.
        model: the model as it was built, on the device. It gives names and structure; its weights are not updated.
        params: fp32[P], the weights.
        stats: fp32[B], the running means and variances.
        keep: fp32[B], the share (1 - momentum) of each running statistic that a step keeps; NaN: of an average.
        half: bf16[P], the weights as `round_weights` has left them; None: they are not needed.
        fixed: by name, the tensors outside the buffers that no step changes and a checkpoint holds (see
            engine/freezing.py); every replica has these same tensors.
        rounded: names of the parameters of which replicas use `half`: those of convolutions and linear layers, which
            autocast would round in every pass; the gradient of such a parameter is rounded likewise.

    Args:
        half: whether `half` is needed.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, layout: ParameterLayout, device: torch.device, half: bool = False) -> None:
        self.layout = layout
        self.device = device
        self.model = model.to(device)
        self.params = torch.zeros(layout.size, device=device)
        self.stats = torch.zeros(layout.stats_size, device=device)
        self.keep = torch.ones(layout.stats_size, device=device)
        self.fixed = dict(fixed(self.model))
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for buffer, slots in ((self.params, layout.params), (self.stats, layout.stats)):
            for slot in slots:
                slot.view(buffer).copy_(tensors[slot.name])
        momentum = {f"{n}.{b}": m for n, m in layout.momentum for b in ("running_mean", "running_var")}
        for slot in layout.stats:
            taken = momentum[slot.name]
            slot.view(self.keep).fill_(math.nan if taken is None else 1 - taken)
        self.half = torch.zeros(layout.size, device=device, dtype=torch.bfloat16) if half else None
        self.rounded = of_products(self.model) if half else frozenset()

    def round_weights(self) -> None:
        """Round the present weights to bfloat16, once for all shards of a step."""
        if self.half is not None:
            self.half.copy_(self.params)

    @property
    def frozen(self) -> int:
        """Elements of all frozen parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if not parameter.requires_grad)

    def copy(self) -> nn.Module:
        """A copy of the model, with the fixed tensors themselves."""
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in self.fixed.values()})

    def eval_model(self) -> nn.Module:
        """A copy of the model in eval mode whose tensors are views of the buffers, so that it is always current."""
        model = self.copy()
        for slot in self.layout.params:
            module, name = _owner(model, slot.name)
            getattr(module, name).data = slot.view(self.params)
        for slot in self.layout.stats:
            module, name = _owner(model, slot.name)
            setattr(module, name, slot.view(self.stats))
        return model.eval()

    def update_stats(self, buffer: Tensor, shards: float, done: Tensor) -> None:
        """running = keep * running + (1 - keep) * (mean of the shards' batch statistics). After `done` steps, fp32[],
        an average over steps keeps done / (done + 1), as torch.nn.BatchNorm2d with momentum=None does."""
        if self.layout.stats_size:
            mean = self.layout.batch_stats(buffer) / shards
            self.stats.lerp_(mean, 1 - torch.where(self.keep.isnan(), done / (done + 1), self.keep))

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Every tensor of the model's state_dict, as views; `num_batches_tracked` is the optimizer step."""
        views = {s.name: s.view(self.params) for s in self.layout.params}
        views |= {s.name: s.view(self.stats) for s in self.layout.stats}
        named = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        # A tensor with several names (a shared module) has its slot under the first of them.
        held = {id(tensor): views[name] for name, tensor in named.items() if name in views}
        found = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name.endswith("num_batches_tracked"):
                found[name] = torch.tensor(step)
            else:
                found[name] = held.get(id(tensor), tensor.detach())
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors (named as by `tensors`) into the buffers, and into the fixed tensors.

        Raises:
            KeyError, RuntimeError: a tensor is missing or has another shape.
        """
        for buffer, slots in ((self.params, self.layout.params), (self.stats, self.layout.stats)):
            for slot in slots:
                slot.view(buffer).copy_(tensors[slot.name])
        for name, tensor in self.fixed.items():
            tensor.copy_(tensors[name])

    def named(self, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Views of a buffer fp32[P] that is laid out like `params` (a momentum, a gradient), by parameter name."""
        for slot in self.layout.params:
            yield slot.name, slot.view(buffer)


@dataclass(frozen=True, slots=True)
class Touched:
    """A parameter whose gradient is zero except in some rows of its matrix (an embedding), and these rows.

    Attributes:
        parameter: index into `ParameterLayout.params`.
        start, stop: the parameter's elements in a gradient buffer, its padding included.
        shape: of the parameter, (rows of the matrix, width).
        rows: int64[k], sorted, on the device: the rows that the global batch touches.
    """

    parameter: int
    start: int
    stop: int
    shape: tuple[int, ...]
    rows: Tensor

    def matrix(self, buffer: Tensor, offset: int = 0) -> Tensor:
        """The parameter's matrix as a view of `buffer`, whose first element is element `offset` of a gradient buffer:
        fp32[shape]."""
        start = self.start - offset
        return buffer[start : start + math.prod(self.shape)].view(self.shape)


class GradientBuffer:
    """A gradient buffer and the views through which a replica writes into it.

    Attributes:
        tensor: fp32[R], the whole buffer.
        head: fp32[head_size], a view of what comes before the gradient.
        gradients: a view for each slot of `ParameterLayout.params`, of the parameter's shape.
        stats: a view for each slot of `ParameterLayout.stats`, fp32[channels].
    """

    def __init__(self, layout: ParameterLayout, device: torch.device) -> None:
        self.tensor = torch.zeros(layout.buffer_size, device=device)
        self.head = layout.head(self.tensor)
        self._dirty: Sequence[Touched] = ()
        self.gradients = [slot.view(layout.gradient(self.tensor)) for slot in layout.params]
        # .data: batch norm saves its buffers for backward, and views that share a version counter would disturb it.
        self.stats = [slot.view(layout.batch_stats(self.tensor)).data for slot in layout.stats]

    def clear(self, touched: Sequence[Touched]) -> None:
        """Zero the head, and the touched parameters' gradients, of which the next pass writes the touched rows only."""
        self.head.zero_()
        for last in self._dirty:
            last.matrix(self.tensor).index_fill_(0, last.rows, 0.0)
        self._dirty = touched


class ReplicaModel:
    """A copy of the model for training: its weights are views of the master's, its gradients views of a gradient
    buffer.

    Attributes:
        module: the copy, in training mode.

    Autograd accumulates into the buffer. A module may also write a weight's gradient itself and return None to
    autograd. It then finds two attributes on the weight:
        `into`   the weight's view of the buffer, or None
        `grad`   `into` where the buffer already holds another shard's gradient, else None
    Where `grad` is None the module overwrites `into` and sets `grad` to it; otherwise it adds its complete gradient to
    `grad` in one addition. Where `into` is None, autograd adds to `grad`, which belongs to this shard alone.

    Batch norm writes the batch's mean and unbiased variance into the buffer: with momentum 1, its running statistics
    are those of the last batch.
    """

    def __init__(self, master: Master) -> None:
        self.module = master.copy().train()
        layout = master.layout
        owners = [_owner(self.module, slot.name) for slot in layout.params]
        self._parameters: list[nn.Parameter] = [getattr(module, name) for module, name in owners]
        for parameter, slot in zip(self._parameters, layout.params, strict=True):
            rounded = master.half is not None and slot.name in master.rounded
            parameter.data = slot.view(master.half if rounded else master.params)  # type: ignore[arg-type]
        spans = [range(slot.start, slot.start + slot.size) for slot in layout.params]
        self._layout, self._copy = layout, GradientCopy([s.shape for s in layout.params], spans, master.device)
        self._stat_owners = [_owner(self.module, slot.name) for slot in layout.stats]
        for module in self.module.modules():
            if isinstance(module, BATCH_NORMS):
                module.momentum = 1.0
                module.num_batches_tracked = None

    def backward(self, loss: Tensor, buffer: GradientBuffer) -> None:
        """Overwrite the gradients in the buffer by those of a loss, a scalar; those of unused parameters become zero.

        The result is that of autograd's own accumulation, and nothing is told to `watch`. On a GPU it is the better
        way: accumulation belongs to the stream on which the parameter was first used.
        """
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        self._copy(found, buffer.gradients, self._layout.gradient(buffer.tensor))

    def watch(self, ready: Callable[[int], None]) -> None:
        """Call `ready(i)` whenever a backward pass has completed the gradient of parameter i, by autograd or by a
        module."""
        # As DistributedDataParallel does; kept here, since a tensor holds its accumulator by a weak reference.
        self._accumulators = [get_gradient_edge(parameter).node for parameter in self._parameters]
        for i, accumulator in enumerate(self._accumulators):
            accumulator.register_hook(functools.partial(self._completed, ready, i))

    def bind_stats(self, buffer: GradientBuffer) -> None:
        """Have batch norms write their statistics into this buffer from now on."""
        for (module, name), stat in zip(self._stat_owners, buffer.stats, strict=True):
            setattr(module, name, stat)

    def bind(self, buffer: GradientBuffer, zeroed: Container[int] | None) -> None:
        """Write into this buffer from now on.

        Args:
            zeroed: indices of the parameters whose gradients in the buffer are zero. The next pass overwrites the
                others, which saves zeroing them and adding to zeros; `finish_pass` must follow it. None: all gradients
                are zero, and passes add to them.
        """
        self._buffer = buffer
        for i, (parameter, gradient) in enumerate(zip(self._parameters, buffer.gradients, strict=True)):
            parameter.grad = gradient if zeroed is None or i in zeroed else None
            parameter.into = None if zeroed is None else gradient  # type: ignore[attr-defined]
        self.bind_stats(buffer)

    def finish_pass(self) -> None:
        """End a pass: zero the gradients of the parameters that it did not use, and fetch those that a backward pass of
        the model's own has put beside the buffer."""
        for parameter, gradient in zip(self._parameters, self._buffer.gradients, strict=True):
            parameter.uses = 0  # type: ignore[attr-defined]
            if parameter.grad is None:
                parameter.grad = gradient.zero_()
            elif parameter.grad is not gradient:
                parameter.grad = gradient.copy_(parameter.grad)

    def _completed(self, ready: Callable[[int], None], index: int, *_: object) -> None:
        parameter, gradient = self._parameters[index], self._buffer.gradients[index]
        if parameter.grad is not gradient and parameter.grad is not None:
            parameter.grad = gradient.copy_(parameter.grad)
        ready(index)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor of a dotted name, and the name's last part."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last
