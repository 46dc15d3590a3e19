"""Counters of a model that nothing asks for: `self.calls += 1`, for somebody to look at.

A graph does not repeat Python, so what a step changes in Python must not matter to later steps. A counter that is only
added to does not. That cannot be seen in its values, since a branch may wait for the thousandth call, but in what is
done with it: while a step's Python runs once more, an object stands in the number's place, adds like it, and notes
whoever asks for more. Python that has not asked for a value does the same whatever the value is, so it will not ask in
a later step either.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Number = int | float


@dataclass(frozen=True, slots=True)
class Counter:
    """A number that a step adds to.

    Attributes:
        name: dotted, for messages.
        held: the dictionary that it is in, an object's attributes or by itself.
        key: its key there.
        steps: what a step adds, in order.
    """

    name: str
    held: dict[Any, Any]
    key: Any
    steps: Sequence[Number] = ()

    def advance(self) -> None:
        """Add what a step adds."""
        for step in self.steps:
            self.held[self.key] += step


class Standing:
    """Stands in the place of a number, has its type and its value, and notes whether somebody asks for the value.

    Adding a number and taking one away make another one, and ask for nothing.

    Args:
        value: the number.
        origin: who is told, and by which name.
        steps: what has been added so far.
    """

    __slots__ = ("__weakref__", "_origin", "_value", "steps")
    __class__: Any = property(lambda one: type(one._value))  # a number's type does not follow from its value

    def __init__(self, value: Number, origin: _Origin, steps: tuple[Number, ...] = ()) -> None:
        self._value, self._origin, self.steps = value, origin, steps
        origin.made.append(weakref.ref(self))

    def __getattr__(self, name: str) -> Any:
        self._origin.asked = True
        return getattr(self._value, name)

    def is_of(self, origin: _Origin) -> bool:
        """Whether it stands for this counter."""
        return self._origin is origin

    def _plus(self, other: Any) -> Any:
        if type(other) in (int, float):
            return Standing(self._value + other, self._origin, (*self.steps, other))
        return _ask("__add__")(self, other)

    def _minus(self, other: Any) -> Any:
        return self._plus(-other) if type(other) in (int, float) else _ask("__sub__")(self, other)


def _ask(name: str) -> Callable[..., Any]:
    """The number's method of that name; noted."""

    def method(self: Any, *args: Any) -> Any:
        self._origin.asked = True
        return getattr(self._value, name)(*args)

    return method


def _methods() -> Iterator[str]:
    """What is said of all numbers, but for what makes an object."""
    own = {*vars(Standing), "__new__", "__init_subclass__", "__subclasshook__", "__getattribute__"}
    own |= {"__setattr__", "__delattr__", "__class__"}
    return (name for name in {*dir(int), *dir(float)} - own if name.startswith("__"))


for _name in _methods():
    setattr(Standing, _name, _ask(_name))
for _name, _method in (("__add__", Standing._plus), ("__radd__", Standing._plus), ("__sub__", Standing._minus)):
    setattr(Standing, _name, _method)


class _Origin:
    """What became of a counter's stand-ins: whether anybody asked for a value, and all that were made."""

    def __init__(self) -> None:
        self.asked = False
        self.made: list[weakref.ref[Standing]] = []


def followed(counters: Sequence[Counter], work: Callable[[], object], restore: Callable[[], object]) -> list[Counter]:
    """Run Python with stand-ins, and return the counters with what it adds to each.

    Args:
        work: a step's Python.
        restore: brings Python's state back, numbers in the place of stand-ins.

    Raises:
        RuntimeError: it asks for a counter's value, keeps that elsewhere, or fails.
    """
    origins = [_Origin() for _ in counters]
    ends: list[tuple[Number, ...] | None] = []
    for counter, origin in zip(counters, origins, strict=True):
        counter.held[counter.key] = Standing(counter.held[counter.key], origin)
    try:
        work()
        for counter, origin in zip(counters, origins, strict=True):
            end = counter.held.get(counter.key)
            ends.append(end.steps if type(end) is Standing and end.is_of(origin) else None)
        end = None
    except Exception as error:
        if not any(origin.asked for origin in origins):
            raise RuntimeError(str(error)) from error
    finally:
        restore()
    gc.collect()
    for i, (counter, origin) in enumerate(zip(counters, origins, strict=True)):
        if origin.asked or ends[i : i + 1] == [None] or any(one() is not None for one in origin.made):
            raise RuntimeError(f"a step asks for the value of {counter.name}, which changes")
    return [
        Counter(counter.name, counter.held, counter.key, steps or ())
        for counter, steps in zip(counters, ends, strict=True)
    ]
