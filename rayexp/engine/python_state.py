"""What Python holds between steps, of which a graph knows nothing.

A graph repeats kernels and nothing around them: a counter in a model stands still, what the host has drawn is drawn
once for all steps, and a tensor is looked for where it lay when the graph was made.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import numbers
import pickle
import random
import sys
from array import array as Numbers
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from rayexp.engine.batch_norm import BATCH_NORMS
from rayexp.engine.contract.draws import GlobalStates
from rayexp.engine.counters import Counter

MOST = 1000
"""Elements of an array, or of a collection, at most: larger ones are data."""
_PLAIN = (numbers.Number, np.generic, str, bytes, enum.Enum, type(None))
_OF_MODULES = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_LIBRARIES = sys.stdlib_module_names | {"rayexp", "torch", "numpy"}
_MISSING = object()


class PythonState:
    """What Python holds at this moment, below some objects, and the states of the host's global generators.

    Attributes:
        values: by dotted name: a number or a text, a tensor, or the state of a generator.
        iterators: names of iterators, which cannot be brought back to where they were.
        places: for some of the values, the dictionary that holds it, and its key there.

    Args:
        parts: the objects, by what a message calls them.
        device: where the tensors of a step lie. Others can change without a kernel.
    """

    def __init__(self, parts: Mapping[str, object], device: torch.device) -> None:
        self._draws = GlobalStates.now(torch.device("cpu"))
        found = _Found(device)
        for name, part in parts.items():
            found.look(name, part)
        self.values, self.iterators, self._undo = found.values, found.iterators, found.undo
        self._growing, self.places = found.growing, found.places

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
            if _differs(since.values.get(name, _MISSING), self.values.get(name, _MISSING)):
                yield f"a step changes {name}"

    def counted(self, since: PythonState) -> list[Counter]:
        """The numbers that are other ones than they were, of those that may be a counter's."""
        pairs = {name: (since.values.get(name), self.values.get(name)) for name in since.places}
        return [
            Counter(name, *since.places[name])
            for name, (before, now) in pairs.items()
            if _differs(before, now) and type(before) is type(now) and type(now) in (int, float)
        ]

    def differs(self, since: PythonState, without: Container[str] = ()) -> Iterator[str]:
        """What is another one than it was, in words; apart from tensors, from draws, and from what has come to be known
        under a new name, such as a cache's entry for another shape."""
        for name, before in since.values.items():
            if name not in self._growing and name not in without and _differs(before, self.values.get(name, _MISSING)):
                yield f"something changes {name}"

    def replaced(self, since: PythonState) -> Iterator[tuple[str, Tensor]]:
        """The tensors in whose place others are, and where that is."""
        for name, before in since.values.items():
            now = self.values.get(name)
            if isinstance(before, Tensor) and isinstance(now, Tensor) and before is not now:
                yield name, before


class _Found:
    """What is found below objects: their values, and what brings each back.

    Looked at are the attributes of modules and of other objects of the user's, with what is in their lists, tuples,
    sets and dictionaries; their classes; hooks and other functions of the user's, with the variables of the scope in
    which they were made; and the global variables of all these. Parameters and the statistics of batch norms are the
    engine's.

    Attributes:
        values, iterators, places: see `PythonState`.
        growing: names of the sizes of dictionaries.
        undo: brings back what was there, as far as it can be changed.
    """

    def __init__(self, device: torch.device) -> None:
        self.values: dict[str, Any] = {}
        self.iterators: list[str] = []
        self.growing: set[str] = set()
        self.places: dict[str, tuple[dict[Any, Any], Any]] = {}
        self.undo: list[Callable[[], object]] = []
        self._device = device
        self._seen: set[int] = set()

    def look(self, name: str, value: Any) -> None:
        """Take down what is there, and below it."""
        small = isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() <= MOST
        if isinstance(value, _PLAIN) or (isinstance(value, Tensor) and (self._device.type == "cpu" or not small)):
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
            for hook in (hook for kind in _HOOKS for hook in vars(value)[kind].values()):
                self.look(f"a hook of {name}", hook)
            for child, module in value.named_children():
                self.look(f"{name}.{child}", module)
            self._class(type(value))
        elif isinstance(value, FunctionType | MethodType | functools.partial | staticmethod | classmethod | property):
            self._seen.add(id(value))
            self._function(name, value)
        elif isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
            self.iterators.append(name)
        elif not isinstance(value, type) and _is_users(type(value)):
            self._seen.add(id(value))
            if hasattr(value, "__dict__"):
                self._attributes(name, vars(value), frozenset())
            self._slots(name, value)
            self._class(type(value))

    def _attributes(self, name: str, held: dict[str, Any], without: frozenset[str]) -> None:
        for key in held.keys() - without:
            if has_history(held[key]):
                held[key] = held[key].detach()
        before = {key: each for key, each in held.items() if key not in without}
        self.undo.append(lambda: _put_back(held, before, without))
        for key, each in before.items():
            self.places[f"{name}.{key}"] = held, key
            self.look(f"{name}.{key}", each)

    def _slots(self, name: str, value: Any) -> None:
        """Attributes of an object that has no dictionary for them."""
        kinds = [kind for kind in type(value).__mro__ if _is_users(kind) and kind is not SimpleNamespace]
        keys = [key for kind in kinds for key, of in vars(kind).items() if isinstance(of, MemberDescriptorType)]
        before = {key: getattr(value, key) for key in keys if hasattr(value, key)}

        def undo() -> None:
            for key, each in before.items():
                if getattr(value, key, _MISSING) is not each:
                    object.__setattr__(value, key, each)  # it may be frozen otherwise

        self.undo.append(undo)
        for key, each in before.items():
            self.look(f"{name}.{key}", each)

    def _class(self, kind: type) -> None:
        for each in kind.__mro__:
            if id(each) not in self._seen and each is not SimpleNamespace and _is_users(each):
                self._seen.add(id(each))
                self._variables(each.__name__, each, lambda key, value: _is_dunder(key) and not callable(value))

    def _module(self, name: str) -> None:
        module = sys.modules.get(name)
        if module is not None and id(module) not in self._seen:
            self._seen.add(id(module))
            self._variables(name, module, lambda key, value: _is_dunder(key) or isinstance(value, ModuleType))

    def _variables(self, name: str, owner: Any, leave_out: Callable[[str, Any], bool]) -> None:
        """Of a class or a module."""
        before = {key: value for key, value in vars(owner).items() if not leave_out(key, value)}

        def undo() -> None:
            for key, value in before.items():
                if vars(owner).get(key, _MISSING) is not value:
                    setattr(owner, key, value)

        self.undo.append(undo)
        for key, value in before.items():
            self.look(f"{name}.{key}", value)

    def _function(self, name: str, value: Any) -> None:
        """What a function holds: variables of the scope in which it was made, defaults and attributes."""
        if isinstance(value, functools.partial):
            parts = [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, property):
            parts = [value.fget, value.fset]
        elif isinstance(value, FunctionType):
            parts = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()] if _is_users(value) else []
        else:
            parts = [getattr(value, "__self__", None), value.__func__]
        for part in parts:
            self.look(name, part)
        if isinstance(value, FunctionType) and _is_users(value):
            self._attributes(name, vars(value), frozenset())
            for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                with contextlib.suppress(ValueError):  # nothing has been put there yet
                    content = cell.cell_contents
                    self.undo.append(functools.partial(setattr, cell, "cell_contents", content))
                    self.look(f"{key} of {name}", content)
            self._module(value.__module__)

    def _collection(self, name: str, value: Any) -> None:
        self.values[f"len({name})"] = len(value)
        if len(value) > MOST:
            return
        if isinstance(value, dict):
            self.growing.add(f"len({name})")
            for key in [key for key, each in value.items() if has_history(each)]:
                value[key] = value[key].detach()
            before = dict(value)
            self.undo.append(lambda: _put_back(value, before, frozenset()))
            for key, each in before.items():
                self.places[f"{name}[{key!r}]"] = value, key
                self.look(f"{name}[{key!r}]", each)
        elif isinstance(value, list | deque):
            for i in [i for i, each in enumerate(value) if has_history(each)]:
                value[i] = value[i].detach()
            items = list(value)
            self.undo.append(lambda: _refill(value, items))
        elif isinstance(value, set):
            members = set(value)
            self.undo.append(lambda: _put_in(value, members))
        if isinstance(value, list | deque | tuple):
            for i, each in enumerate(value):
                self.look(f"{name}[{i}]", each)


def _is_users(kind: type | FunctionType) -> bool:
    """Whether a class or a function is of no library. A library's objects may have threads of their own."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    library = kind.__module__.partition(".")[0] in _OF_LIBRARIES or "site-packages" in file
    return kind is SimpleNamespace or not library


def _differs(before: Any, now: Any) -> bool:
    """Whether a value is another one; of two tensors never."""
    both = isinstance(before, Tensor) and isinstance(now, Tensor)
    return not both and before is not now and not (type(before) is type(now) and before == now)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def has_history(value: Any) -> bool:
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
    if isinstance(value, bytearray | Numbers) and len(value) <= MOST:
        content = value[:]
        return bytes(content), lambda: _write(value, content)
    if isinstance(value, np.ndarray) and value.size <= MOST and not value.dtype.hasobject:
        array = value.copy()
        return array.tobytes(), lambda: _write(value, array)
    return None


def _copy(into: Tensor, content: Tensor) -> None:
    with torch.no_grad():
        into.copy_(content)


def _write(into: Any, content: Any) -> None:
    if not isinstance(into, np.ndarray):
        into[:] = content
    elif into.flags.writeable:
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
