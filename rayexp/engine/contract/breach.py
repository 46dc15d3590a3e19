"""What breaks the contract, as values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Level = Literal["always", "exact", "note"]
SHOWN = 3  # others that a line names


@dataclass(frozen=True, slots=True)
class Breach:
    """One thing that a model (or a workload) does and should not.

    Attributes:
        part: the key of the configuration that names the culprit: `model` or `workload`.
        module: dotted name of the module, parameter or buffer; empty: the whole.
        what: a sentence without a subject in front, that names the module.
        allowed: a way out.
        level: `always`: no reduction trains this. `exact`: `exact` refuses it, and `ddp` warns. `note`: it is allowed,
            and somebody should know.
        others: modules (parameters, buffers) of which the same is true, word for word.
    """

    part: str
    module: str
    what: str
    allowed: str
    level: Level = "exact"
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = f" and {len(self.others) - SHOWN} more" if len(self.others) > SHOWN else ""
        likewise = f" (likewise {', '.join(self.others[:SHOWN])}{more})" if self.others else ""
        return f"{self.part}: {self.what}{likewise}; allowed: {self.allowed}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        others = {"others": list(self.others)} if self.others else {}
        return {"key": self.part, "module": self.module, "what": self.what, "allowed": self.allowed, **others}


@dataclass(frozen=True, slots=True)
class Contract:
    """The result of a check.

    Attributes:
        reduction: the configuration's.
        breaches: what was found, each once.
        checked: what was tried, a few words each.
    """

    reduction: str
    breaches: tuple[Breach, ...]
    checked: tuple[str, ...]

    @property
    def refused(self) -> list[Breach]:
        """What the configured reduction refuses."""
        return [breach for breach in self.breaches if self._refuses(breach)]

    @property
    def warnings(self) -> list[Breach]:
        """What it does not refuse, and somebody should know."""
        return [breach for breach in self.breaches if not self._refuses(breach)]

    def _refuses(self, breach: Breach) -> bool:
        return breach.level == "always" or (breach.level == "exact" and self.reduction == "exact")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "ok": not self.refused,
            "reduction": self.reduction,
            "refused": [breach.to_json() for breach in self.refused],
            "warnings": [breach.to_json() for breach in self.warnings],
            "checked": list(self.checked),
        }


def named(name: str, module: nn.Module | None = None, kind: str = "") -> str:
    """`middle.1 (Functional)`; `the model (Net)`."""
    kind = kind or (type(module).__name__ if module is not None else "")
    return f"{name or 'the model'} ({kind})" if kind else name or "the model"


def module_in(where: str) -> str:
    """The dotted name in what `named` gives: `middle.1`; empty for `the model`, and for `the loss`."""
    return where.partition(" (")[0].removeprefix("the model").removeprefix("the loss")


def once(breaches: Sequence[Breach]) -> tuple[Breach, ...]:
    """Without repetitions: of several about one module with the same way out, the first; and what is said of several
    modules in the same words once, with the others' names."""
    found: dict[tuple[str, str, str], Breach] = {}
    for breach in breaches:
        found.setdefault((breach.part, breach.module or breach.what, breach.allowed), breach)
    alike: dict[tuple[str, ...], list[Breach]] = {}
    for breach in found.values():
        name = rf"(?<![\w.]){re.escape(breach.module)}(?!\w)"
        words = re.sub(name, "*", breach.what) if breach.module else breach.what
        alike.setdefault((breach.part, words, breach.allowed), []).append(breach)
    return tuple(
        dataclasses.replace(first, others=tuple(other.module for other in others)) for first, *others in alike.values()
    )
