"""What the modules of a model are given and what they make in a pass, so that a difference between two passes can be
traced to the module that makes it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rayexp.engine.contract.draws import GlobalStates

Digest = Callable[[Tensor], Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module.

    Attributes:
        name: dotted; empty: the model.
        kind: its class.
        given, made: digests of the tensors that it was given and that it returned.
        drew: the global generators from which it has drawn itself, and not a module within it.
    """

    name: str
    kind: str
    given: tuple[Any, ...]
    made: tuple[Any, ...]
    drew: tuple[str, ...]


@dataclass
class _Open:
    name: str
    module: nn.Module
    given: tuple[Any, ...]
    states: GlobalStates
    inner: set[str] = field(default_factory=set)  # what modules within have drawn from


class Calls:
    """Notes the calls of a model's modules while the block runs.

    Attributes:
        done: the calls, in the order in which they ended.
        ended: whether the model has returned.
        output: what it returned last.
        backward: set it while gradients are computed.
        again: the names of modules that were called meanwhile (activation checkpointing); such calls may never end.

    Args:
        model: the model.
        digest: of each tensor.
        device: where it computes.
    """

    def __init__(self, model: nn.Module, digest: Digest, device: torch.device) -> None:
        self.model, self.digest, self.device = model, digest, device
        self.done: list[Call] = []
        self.ended = False
        self.output: Any = None
        self.backward = False
        self.again: list[str] = []
        self._open: list[_Open] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Calls:
        for name, module in self.model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._begin(name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._end))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def inside(self) -> str:
        """The innermost module that has begun and not ended: `middle.1 (Functional)`; empty where there is none."""
        return f"{self._open[-1].name or 'the model'} ({type(self._open[-1].module).__name__})" if self._open else ""

    def drawing(self) -> dict[str, tuple[str, ...]]:
        """The modules that have drawn from a global generator: `middle.1 (Functional)` -> the generators."""
        return {f"{call.name or 'the model'} ({call.kind})": call.drew for call in self.done if call.drew}

    def _begin(self, name: str) -> Callable[..., None]:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.backward:
                self.again.append(name)
            given = tuple(self.digest(tensor) for tensor in tensors((args, kwargs)))
            self._open.append(_Open(name, module, given, GlobalStates.now(self.device)))

        return begin

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        # Activation checkpointing leaves a pass that it repeats as soon as it has what it needs.
        while self._open and self._open[-1].module is not module:
            self._open.pop()
        if not self._open:
            return
        call = self._open.pop()
        drew = set(GlobalStates.now(self.device).moved(call.states))
        if self._open:
            self._open[-1].inner |= drew
        made = tuple(self.digest(tensor) for tensor in tensors(output))
        own = tuple(sorted(drew - call.inner))
        self.done.append(Call(call.name, type(module).__name__, call.given, made, own))
        if module is self.model:
            self.ended, self.output = True, output


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(tensors, value.values()))
    elif isinstance(value, tuple | list):
        yield from itertools.chain.from_iterable(map(tensors, value))


# ---------------------------------------------------------------------- two passes over the same samples


def exact(tensor: Tensor) -> Any:
    """A digest that is equal for equal bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha1(data, usedforsecurity=False).hexdigest()


def first_unlike(one: Sequence[Call], other: Sequence[Call]) -> Call | None:
    """The first call that makes something else of the same; None where there is none to be seen."""
    for a, b in zip(one, other, strict=False):
        if a.name != b.name:
            return None
        if a.given == b.given and a.made != b.made:
            return a
    return None


# ---------------------------------------------------------------------- shards alone and together


Sums = tuple[tuple[int, ...], list[Tensor]]


def sums(tensor: Tensor) -> Sums:
    """A digest for `first_mixing`: the shape, and for each dimension the sums of values and of magnitudes over all
    others, float64[2, size]."""
    values = tensor.detach().double().cpu()
    found = []
    for dim in range(values.ndim):
        rows = values.transpose(0, dim).reshape(values.shape[dim], -1)
        found.append(torch.stack([rows.sum(1), rows.abs().sum(1)]))
    return tuple(tensor.shape), found


def first_mixing(alone: Sequence[Sequence[Call]], together: Sequence[Call], tolerance: float) -> Call | None:
    """The first call that makes of two shards together something else than of each alone, where what it was given is
    the same; None where there is none to be seen.

    Args:
        alone: the calls of a pass over each of two shards; digests are `sums`.
        together: those of a pass over both.
        tolerance: relative, of a sum.
    """
    one, other = alone
    for a, b, both in zip(one, other, together, strict=False):
        if not a.name == b.name == both.name:
            return None
        given, made = (
            [_joined(*each, tolerance) for each in zip(*digests, strict=False)]
            for digests in ((a.given, b.given, both.given), (a.made, b.made, both.made))
        )
        if all(given) and not all(made):
            return both
    return None


def _joined(one: Sums, other: Sums, both: Sums, tolerance: float) -> bool:
    """Whether a tensor is two others one after the other along some dimension, or all three are the same."""
    shapes = (one[0], other[0], both[0])
    if len({len(shape) for shape in shapes}) > 1:
        return False
    if shapes[0] == shapes[1] == shapes[2]:
        return all(
            _close(a, c, tolerance) and _close(b, c, tolerance)
            for a, b, c in zip(one[1], other[1], both[1], strict=True)
        )
    for dim in range(len(shapes[0])):
        rest = [shape[:dim] + shape[dim + 1 :] for shape in shapes]
        if rest[0] == rest[1] == rest[2] and shapes[0][dim] + shapes[1][dim] == shapes[2][dim]:
            return _close(torch.cat([one[1][dim], other[1][dim]], 1), both[1][dim], tolerance)
    return False


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    scale = max(float(one.abs().max()), float(other.abs().max())) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
