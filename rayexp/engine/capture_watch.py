"""Watches captures: whether a graph would do what the Python around it does, and what must stay where it is for it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from rayexp.engine.counters import Counter, followed
from rayexp.engine.python_state import PythonState, has_history


class Reads(TorchFunctionMode):
    """Notes which tensors operations are given while the block runs, of those that were not made meanwhile.

    Attributes:
        operations: which ones these were, and the numbers and words that they were given.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read: dict[int, weakref.ref[Tensor]] = {}
        self._made: set[int] = set()  # addresses of memory
        self.operations: list[tuple[str, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) in (int, float, bool, str)]
        self.operations.append((getattr(func, "__name__", str(func)), repr(plain)))
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

    Attributes:
        before: Python's state.
        counted: numbers that have changed, and may be a counter's.

    Args:
        parts, device: see `PythonState`.
        follow: whether to note what operations are given (not while a compiler traces them).
    """

    def __init__(self, parts: Mapping[str, object], device: torch.device, follow: bool = True) -> None:
        self._parts, self._device = parts, device
        self._reads = Reads() if follow else None
        self._found: list[str] = []
        self.counted: list[Counter] = []
        self._gone: set[int] = set()  # by id: tensors in whose place others are, unread
        self.before: PythonState | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> CaptureWatch:
        self.before = PythonState(self._parts, self._device)
        if iterators := self.before.iterators:
            raise RuntimeError(f"{iterators[0]} is an iterator, which a graph does not move on")
        if self._reads is not None:
            self._stack.enter_context(self._reads)
        return self

    def __exit__(self, *exc: Any) -> None:
        assert self.before is not None
        self._stack.close()
        if exc[0] is None:
            now = PythonState(self._parts, self._device)
            self._found, self.counted = list(now.changed(self.before)), now.counted(self.before)
            for name, tensor in now.replaced(self.before):
                if self._reads is None or self._reads.has(tensor):
                    self._found.append(f"a step reads {name} and puts another tensor there")
                self._gone.add(id(tensor))
        self.before.restore()

    def refuse(self) -> None:
        """Raise RuntimeError where a graph would not do what this Python does."""
        if self._found:
            raise RuntimeError(f"{self._found[0]}, which a graph does not repeat")

    def counters(self, known: Collection[Counter], new: bool, again: Callable[[], object]) -> list[Counter]:
        """The counters that this Python adds to and nobody asks for, with what it adds.

        Args:
            known: those of earlier captures, which must not be asked for here either.
            new: whether there may be others.
            again: another capture of the same.

        Raises:
            RuntimeError: as `refuse`; a changed number that is asked for is no counter.
        """
        names = {counter.name for counter in self.counted}
        if len(names) < len(self._found) or self._reads is None or not (new or names <= {c.name for c in known}):
            self.refuse()
        asked = [*self.counted, *(counter for counter in known if counter.name not in names)]
        if not asked or self.before is None:
            return []
        reads = Reads()

        def work() -> None:
            with reads:
                again()

        try:
            found = followed(asked, work, self.before.restore)
        except RuntimeError:
            self.refuse()
            raise
        if self._reads is None or reads.operations != self._reads.operations:
            raise RuntimeError(f"a step asks what {asked[0].name} is")
        return found

    def read(self) -> list[Tensor]:
        """What the captured work may read and somebody holds. A graph looks for it in its place, so it must stay there
        though its holder may take another."""
        held = [value for value in (self.before.values.values() if self.before else ()) if isinstance(value, Tensor)]
        found = {id(tensor): tensor for tensor in held if id(tensor) not in self._gone}
        found |= {id(tensor): tensor for tensor in (self._reads.alive() if self._reads else ())}
        return [tensor.detach() if has_history(tensor) else tensor for tensor in found.values()]


def _addresses(value: Any) -> dict[Tensor, int]:
    """The tensors in some collection and where their memory begins, of those that have memory."""
    found = {}
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            with contextlib.suppress(RuntimeError):  # a tensor that only stands for others
                if where := leaf.untyped_storage().data_ptr():
                    found[leaf] = where
    return found
