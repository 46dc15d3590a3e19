"""What the reports on two checkpoints have in common, whatever these judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Self

from rayexp.diff.noise import NoiseComparison
from rayexp.diff.pair import Checkpoint, config_changes, same_model
from rayexp.diff.statistics import DropVerdict


@dataclass(frozen=True, slots=True)
class PairReport(ABC):
    """What changed from A to B.

    Attributes:
        max_drop: what B may be worse by, in the measure of the kind; None where no verdict was asked.
        noise: what a reseed changes; None where it is not known.
    """

    a: Checkpoint
    b: Checkpoint
    max_drop: float | None = field(default=None, kw_only=True)
    noise: NoiseComparison | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def ruling(self) -> DropVerdict | None:
        """May B be worse by `max_drop`? None where none was asked."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return self.to_json()

    @property
    def same_model(self) -> bool:
        """Whether both sides have the same weights, bit for bit."""
        return same_model(self.a, self.b)

    @property
    def verdict(self) -> str | None:
        """PASS, FAIL or INCONCLUSIVE against `max_drop`; None where none was asked."""
        return self.ruling.word if self.ruling else None

    def within(self, max_drop: float | None) -> Self:
        """The same report with a verdict."""
        return replace(self, max_drop=max_drop)

    def beside(self, noise: NoiseComparison | None) -> Self:
        """The same report with what a reseed changes."""
        return replace(self, noise=noise)

    def sides(self) -> dict[str, Any]:
        """The keys of `to_json` that say what was compared."""
        return {
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "same_model": self.same_model,
            "config_changes": [{"key": k, "a": x, "b": y} for k, x, y in config_changes(self.a, self.b)],
        }

    def decision(self) -> dict[str, Any]:
        """The keys of `to_json` that set the change beside what is allowed, and what a reseed brings about."""
        return {
            "noise": self.noise and self.noise.to_json(),
            "max_drop": self.max_drop,
            "verdict": self.verdict,
            "verdict_reason": self.ruling and self.ruling.why,
        }
