"""What Python holds between steps is seen, and brought back."""

from __future__ import annotations

import enum
import random
from array import array
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from queue import SimpleQueue
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from rayexp.engine.capture_watch import CaptureWatch
from rayexp.engine.python_state import MOST, PythonState

CPU = torch.device("cpu")
COUNT = 0


class Kind(enum.Enum):
    ONE, TWO = 1, 2


class Slots:
    __slots__ = ("__private", "number")

    def __init__(self) -> None:
        self.number, self.__private = 1, [1]

    def add(self, *, seen: list[int] = []) -> None:  # noqa: B006
        self.__private.append(1)

    def remember(self, *, seen: list[int] = []) -> None:  # noqa: B006
        seen.append(1)


def count_globally() -> None:
    global COUNT
    COUNT += 1


class Part:
    """An object of the user's."""

    shared: ClassVar[int] = 1
    listed: ClassVar[list[int]] = [1]

    def __init__(self) -> None:
        self.number, self.word, self.nothing = 1, "a", None
        self.items, self.line, self.members = [1, [2]], deque([1, 2], maxlen=2), {1, 2}
        self.named = {"a": 1, "b": {"c": 2}}
        self.array, self.data = np.arange(3), np.arange(MOST + 1)
        self.luck, self.legacy = random.Random(0), np.random.RandomState(0)
        self.generator, self.host = torch.Generator(), torch.zeros(3)
        self.pair = ([1], 2)
        self.me = self
        self.bytes, self.numbers, self.fraction = bytearray(b"ab"), array("i", [1, 2]), Fraction(1, 2)
        self.slots, self.scale, self.kind = Slots(), np.float32(2), Kind.ONE
        inner, seen = 0, [0]

        def count() -> None:
            nonlocal inner
            inner += 1
            seen.append(inner)

        self.count, self.bound = count, Slots().add


CHANGES: dict[str, Callable[[Part], object]] = {
    "number": lambda p: setattr(p, "number", 2),
    "kind": lambda p: setattr(p, "number", 1.0),
    "word": lambda p: setattr(p, "word", "b"),
    "nothing": lambda p: setattr(p, "nothing", 0),
    "new": lambda p: setattr(p, "new", 1),
    "gone": lambda p: delattr(p, "number"),
    "items": lambda p: p.items.append(3),
    "another list": lambda p: setattr(p, "items", [2, [2]]),
    "inner": lambda p: p.items[1].__setitem__(0, 3),  # type: ignore[index]
    "line": lambda p: p.line.append(3),
    "members": lambda p: p.members.add(3),
    "named": lambda p: p.named.update(d=1),
    "deep": lambda p: p.named["b"].update(c=3),  # type: ignore[attr-defined]
    "array": lambda p: p.array.__iadd__(1),
    "luck": lambda p: p.luck.random(),
    "legacy": lambda p: p.legacy.rand(),
    "generator": lambda p: torch.rand(1, generator=p.generator),
    "host": lambda p: p.host.add_(1),
    "in a pair": lambda p: p.pair[0].append(1),
    "bytes": lambda p: p.bytes.append(1),
    "numbers": lambda p: p.numbers.append(1),
    "fraction": lambda p: setattr(p, "fraction", p.fraction / 2),
    "scale": lambda p: setattr(p, "scale", p.scale * 2),
    "enum": lambda p: setattr(p, "kind", Kind.TWO),
    "slot": lambda p: setattr(p.slots, "number", 2),
    "private slot": lambda p: p.slots.add(),
    "default": lambda p: p.slots.remember(),
    "of the class": lambda p: setattr(Part, "shared", 2),
    "in the class": lambda p: Part.listed.append(2),
    "closure": lambda p: p.count(),
    "bound method": lambda p: p.bound(),
    "function": lambda p: setattr(count_globally, "calls", 1),
    "global": lambda p: count_globally(),
    "python": lambda p: random.random(),
    "numpy": lambda p: np.random.rand(),
    "torch": lambda p: torch.rand(1),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_change_is_seen_and_brought_back(name: str) -> None:
    part, device = Part(), torch.device("cuda")
    before = PythonState({"part": part}, device)
    assert list(PythonState({"part": part}, device).changed(before)) == []
    held = dict(vars(part))
    CHANGES[name](part)
    assert len(list(PythonState({"part": part}, device).changed(before))) >= 1
    before.restore()
    assert list(PythonState({"part": part}, device).changed(before)) == []
    assert all(vars(part)[key] is value for key, value in held.items())
    assert vars(part).keys() == held.keys()


def test_what_is_data_or_a_librarys_is_left_alone() -> None:
    part = SimpleNamespace(rows=list(range(MOST + 1)), big=np.zeros(MOST + 1), kind=Part)
    before = PythonState({"part": part}, CPU)
    part.rows[0] = -1
    part.big += 1
    assert list(PythonState({"part": part}, CPU).changed(before)) == []
    before.restore()
    assert (part.rows[0], part.big[0]) == (-1, 1)


def test_a_watch_tells_what_was_read_from_what_was_made() -> None:
    part = SimpleNamespace(one=torch.ones(3), other=torch.ones(3), size=torch.ones(2))
    apart, asked = torch.ones(4), torch.ones(4)
    with CaptureWatch({"part": part}, CPU) as watch:
        made = part.one * 2
        made = made + made[:2].sum() + len(asked) + len(part.size)
        apart[:2].mul_(2)
        part.other, part.size = made, made
    watch.refuse()
    tensors = part.one, apart, asked, part.other, part.size, made
    kept = [any(each is one for one in watch.read()) for each in tensors]
    assert kept == [True, True, False, False, False, False]
    assert (len(part.other), len(part.size)) == (3, 2)
    with CaptureWatch({"part": part}, CPU) as watch:
        part.other = part.other * 2
    with pytest.raises(RuntimeError, match=r"a step reads part.other and puts another tensor there, which a graph"):
        watch.refuse()


def test_nothing_that_a_graph_reads_holds_a_backward_pass() -> None:
    weight = torch.ones(3, requires_grad=True)
    part = SimpleNamespace(kept=weight * 2, listed=[weight * 2], named={"a": weight * 2})
    with CaptureWatch({"part": part}, CPU) as watch:
        part.kept.sum(), part.listed[0].sum(), part.named["a"].sum(), weight.sum()
    assert all(tensor.grad_fn is None for tensor in (part.kept, part.listed[0], part.named["a"], *watch.read()))
    assert len(watch.read()) == 4  # and not what the sums were made of


def test_a_counter_is_one_from_the_first_capture_on() -> None:
    """What has been captured before may have asked for it."""
    part = SimpleNamespace(calls=3)
    kept: SimpleQueue[int] = SimpleQueue()

    def counts() -> None:
        part.calls += 2
        part.calls -= 1

    def keeps() -> None:
        kept.put(part.calls)
        counts()

    def watched(work: Callable[[], None]) -> CaptureWatch:
        with CaptureWatch({"part": part}, CPU) as watch:
            work()
        return watch

    (found,) = watched(counts).counters([], True, counts)
    assert (found.name, found.steps, part.calls) == ("part.calls", (2, -1), 3)
    found.advance()
    assert part.calls == 4
    assert [one.steps for one in watched(counts).counters([found], False, counts)] == [(2, -1)]
    assert [one.steps for one in watched(lambda: None).counters([found], False, lambda: None)] == [()]
    for known, new, work in (([], False, counts), ([], True, keeps)):
        with pytest.raises(RuntimeError, match=r"^a step changes part.calls, which a graph does not repeat$"):
            watched(work).counters(known, new, work)
    assert part.calls == 4
