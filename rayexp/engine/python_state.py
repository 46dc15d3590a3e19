"""What Python holds between steps, of which a graph knows nothing.

A graph repeats kernels and nothing around them: a counter in a model stands still, what the host has drawn is drawn
once for all steps, and a tensor is looked for where it lay when the graph was made.
"""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from rayexp.engine.batch_norm import BATCH_NORMS
from rayexp.engine.contract.draws import GlobalStates

MOST = 1000
"""Elements of an array, or of a collection, at most: larger ones are data."""
_PLAIN = (int, float, complex, bool, str, bytes, type(None))
_OF_MODULES = frozenset(vars(nn.Module()))
_OF_LIBRARIES = sys.stdlib_module_names | {"rayexp", "torch", "numpy"}
_MISSING = object()


class PythonState:
    """What Python holds at this moment, below some objects, and the states of the host's global generators.

    Attributes:
        values: by dotted name: a number or a text, a tensor, or the state of a generator.

    Args:
        parts: the objects, by what a message calls them.
        device: where the tensors of a step lie. Others can change without a kernel.
    """

    def __init__(self, parts: Mapping[str, object], device: torch.device) -> None:
        self._draws = GlobalStates.now(torch.device("cpu"))
        found = _Found(device)
        for name, part in parts.items():
            found.look(name, part)
        self.values, self._undo = found.values, found.undo

    def restore(self) -> None:
        """Bring back what was there, as far as it can be changed."""
        for undo in self._undo:
            undo()
        self._draws.restore(torch.device("cpu"))

    def changed(self, since: PythonState) -> Iterator[str]:
        """What is another one than it was, in words, but for tensors that have taken the place of others."""
        for whose in self._draws.moved(since._draws):
            yield f"a step draws from {whose} global generator on the host"
        for name in dict.fromkeys([*since.values, *self.values]):
            before, now = since.values.get(name, _MISSING), self.values.get(name, _MISSING)
            both = isinstance(before, Tensor) and isinstance(now, Tensor)
            if not both and before is not now and not (type(before) is type(now) and before == now):
                yield f"a step changes {name}"

    def replaced(self, since: PythonState) -> Iterator[tuple[str, Tensor]]:
        """The tensors in whose place others are, and where that is."""
        for name, before in since.values.items():
            now = self.values.get(name)
            if isinstance(before, Tensor) and isinstance(now, Tensor) and before is not now:
                yield name, before


class _Found:
    """What is found below objects: their values, and what brings each back.

    Looked at are the attributes of modules and of other objects of the user's, with what is in their lists, tuples,
    sets and dictionaries. Parameters and the statistics of batch norms are the engine's.

    Attributes:
        values: see `PythonState`.
        undo: brings back what was there, as far as it can be changed.
    """

    def __init__(self, device: torch.device) -> None:
        self.values: dict[str, Any] = {}
        self.undo: list[Callable[[], object]] = []
        self._device = device
        self._seen: set[int] = set()

    def look(self, name: str, value: Any) -> None:
        """Take down what is there, and below it."""
        small = isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() <= MOST
        if type(value) in _PLAIN or (isinstance(value, Tensor) and (self._device.type == "cpu" or not small)):
            self.values[name] = value
        elif id(value) in self._seen:
            return
        elif (way := _state_of(value)) is not None:
            self._seen.add(id(value))
            self.values[name], undo = way
            self.undo.append(undo)
        elif isinstance(value, dict | list | tuple | set | frozenset | deque):
            self._seen.add(id(value))
            self._collection(name, value)
        elif isinstance(value, nn.Module):
            self._seen.add(id(value))
            self._attributes(name, vars(value), _OF_MODULES)
            if not isinstance(value, BATCH_NORMS):  # whose statistics are the engine's
                self._attributes(name, value._buffers, frozenset())
            for child, module in value.named_children():
                self.look(f"{name}.{child}", module)
        elif hasattr(value, "__dict__") and not isinstance(value, type) and _is_users(type(value)):
            self._seen.add(id(value))
            self._attributes(name, vars(value), frozenset())

    def _attributes(self, name: str, held: dict[str, Any], without: frozenset[str]) -> None:
        for key in held.keys() - without:
            if _has_history(held[key]):
                held[key] = held[key].detach()
        before = {key: each for key, each in held.items() if key not in without}
        self.undo.append(lambda: _put_back(held, before, without))
        for key, each in before.items():
            self.look(f"{name}.{key}", each)

    def _collection(self, name: str, value: Any) -> None:
        self.values[f"len({name})"] = len(value)
        if len(value) > MOST:
            return
        if isinstance(value, dict):
            for key in [key for key, each in value.items() if _has_history(each)]:
                value[key] = value[key].detach()
            before = dict(value)
            self.undo.append(lambda: _put_back(value, before, frozenset()))
            for key, each in before.items():
                self.look(f"{name}[{key!r}]", each)
        elif isinstance(value, list | deque):
            for i in [i for i, each in enumerate(value) if _has_history(each)]:
                value[i] = value[i].detach()
            items = list(value)
            self.undo.append(lambda: _refill(value, items))
        elif isinstance(value, set):
            members = set(value)
            self.undo.append(lambda: _put_in(value, members))
        if isinstance(value, list | deque | tuple):
            for i, each in enumerate(value):
                self.look(f"{name}[{i}]", each)


class Reads(TorchFunctionMode):
    """Notes which tensors operations are given while the block runs, of those that were not made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._read: dict[int, weakref.ref[Tensor]] = {}
        self._made: set[int] = set()  # addresses of memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # What makes no tensor asks for a shape or a device, which reads nothing: for a value it could not ask.
        if results := _addresses(made):
            given = _addresses((args, kwargs))
            for tensor, where in given.items():
                if where not in self._made:
                    self._read.setdefault(id(tensor), weakref.ref(tensor))
            self._made.update(set(results.values()) - set(given.values()))
        return made

    def alive(self) -> list[Tensor]:
        """Those that are still there."""
        return [tensor for read in self._read.values() if (tensor := read()) is not None]

    def has(self, tensor: Tensor) -> bool:
        """Whether this one was read."""
        return id(tensor) in self._read and self._read[id(tensor)]() is tensor


class CaptureWatch:
    """Watches a capture. That runs a step's Python once and computes nothing, so Python's state is after the block as
    it was before.

    Args:
        parts, device: see `PythonState`.
        follow: whether to note what operations are given (not while a compiler traces them).
    """

    def __init__(self, parts: Mapping[str, object], device: torch.device, follow: bool = True) -> None:
        self._parts, self._device = parts, device
        self._reads = Reads() if follow else None
        self._found: list[str] = []
        self._gone: set[int] = set()  # by id: tensors in whose place others are, unread
        self._before: PythonState | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> CaptureWatch:
        self._before = PythonState(self._parts, self._device)
        if self._reads is not None:
            self._stack.enter_context(self._reads)
        return self

    def __exit__(self, *exc: Any) -> None:
        assert self._before is not None
        self._stack.close()
        if exc[0] is None:
            now = PythonState(self._parts, self._device)
            self._found = list(now.changed(self._before))
            for name, tensor in now.replaced(self._before):
                if self._reads is None or self._reads.has(tensor):
                    self._found.append(f"a step reads {name} and puts another tensor there")
                self._gone.add(id(tensor))
        self._before.restore()

    def refuse(self) -> None:
        """Raise RuntimeError where a graph would not do what this Python does."""
        if self._found:
            raise RuntimeError(f"{self._found[0]}, which a graph does not repeat")

    def read(self) -> list[Tensor]:
        """What the captured work may read and somebody holds. A graph looks for it in its place, so it must stay there
        though its holder may take another."""
        held = [value for value in (self._before.values.values() if self._before else ()) if isinstance(value, Tensor)]
        found = {id(tensor): tensor for tensor in held if id(tensor) not in self._gone}
        found |= {id(tensor): tensor for tensor in (self._reads.alive() if self._reads else ())}
        return [tensor.detach() if _has_history(tensor) else tensor for tensor in found.values()]


def _addresses(value: Any) -> dict[Tensor, int]:
    """The tensors in some collection and where their memory begins, of those that have memory."""
    found = {}
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            with contextlib.suppress(RuntimeError):  # a tensor that only stands for others
                if where := leaf.untyped_storage().data_ptr():
                    found[leaf] = where
    return found


def _is_users(kind: type) -> bool:
    """Whether a class is of no library. A library's objects may have threads of their own."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    library = kind.__module__.partition(".")[0] in _OF_LIBRARIES or "site-packages" in file
    return kind is SimpleNamespace or not library


def _has_history(value: Any) -> bool:
    """Whether it is a tensor that still knows what it was computed from. Its backward pass has run, and what is left of
    that belongs to another stream than a capture's, which PyTorch refuses."""
    return isinstance(value, Tensor) and value.grad_fn is not None


def _state_of(value: Any) -> tuple[Any, Callable[[], object]] | None:
    """What an object holds that Python can change in its place, comparable, and what brings it back; None: it is no
    generator, and no small array of the host's."""
    if isinstance(value, random.Random):
        of_python = value.getstate()
        return of_python, lambda: value.setstate(of_python)
    if isinstance(value, np.random.Generator):
        of_numpy: Any = value.bit_generator.state
        return pickle.dumps(of_numpy), lambda: setattr(value.bit_generator, "state", of_numpy)
    if isinstance(value, np.random.RandomState):
        legacy: Any = value.get_state()
        return pickle.dumps(legacy), lambda: value.set_state(legacy)
    if isinstance(value, Generator) and value.device.type == "cpu":
        of_torch = value.get_state()
        return of_torch.numpy().tobytes(), lambda: value.set_state(of_torch)
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() <= MOST:
        copy = value.detach().clone()
        return (value.dtype, value.shape, copy.flatten().tolist()), lambda: _copy(value, copy)
    if isinstance(value, np.ndarray) and value.size <= MOST and not value.dtype.hasobject:
        array = value.copy()
        return array.tobytes(), lambda: _write(value, array)
    return None


def _copy(into: Tensor, content: Tensor) -> None:
    with torch.no_grad():
        into.copy_(content)


def _write(into: Any, content: Any) -> None:
    if into.flags.writeable:
        into[...] = content


def _put_in(into: Any, members: set[Any]) -> None:
    into.clear()
    into.update(members)


def _refill(into: Any, items: list[Any]) -> None:
    into.clear()
    into.extend(items)


def _put_back(held: dict[Any, Any], before: Mapping[Any, Any], without: frozenset[str]) -> None:
    """Bring a dictionary back, as it may be an object's: what has not changed is not touched."""
    for key in held.keys() - before.keys() - without:
        del held[key]
    for key, value in before.items():
        if held.get(key, _MISSING) is not value:
            held[key] = value
