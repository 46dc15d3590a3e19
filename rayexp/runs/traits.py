"""What a workload says of its runs: what throughput counts, of which kind the predictions are, which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Goal = Literal["max", "min"]


@dataclass(frozen=True, slots=True)
class Traits:
    """A workload's `unit`, `kind` and `goals`, as run.json has them.

    Attributes:
        unit: what throughput counts: `images`, `tokens`, `samples`.
        kind: the kind of the predictions (see records.Predictions): `images`, `tokens` or `samples`.
        goals: the workload's metrics in the order in which they are shown, and whether more or less is better. The
            first decides which epoch is the best; where there is none, the validation loss does.
    """

    unit: str = "samples"
    kind: str = "samples"
    goals: Mapping[str, Goal] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
        return {"unit": self.unit, "kind": self.kind, "goals": dict(self.goals)}


IMAGES = Traits("images", "images", {"acc1": "max", "acc5": "max"})
TOKENS = Traits("tokens", "tokens", {"ppl": "min"})
# Of the runs whose run.json does not say it, by the name of their workload.
_OLD = {"image_classification": IMAGES, "language_model": TOKENS}


def traits_of(meta: Mapping[str, Any]) -> Traits:
    """What run.json says of the workload; what an older rayexp did not write, or what is damaged, by the workload's
    name."""
    old = _OLD.get(str(meta.get("workload")), Traits())
    unit, kind, goals = meta.get("unit"), meta.get("kind"), meta.get("goals")
    return Traits(
        unit if isinstance(unit, str) and unit else old.unit,
        kind if isinstance(kind, str) and kind else old.kind,
        dict(goals) if isinstance(goals, dict) and {*map(str, goals.values())} <= {"max", "min"} else old.goals,
    )
