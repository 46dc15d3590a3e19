"""What the reports on two checkpoints have in common, whatever these judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from rayexp.diff.noise import NoiseComparison
from rayexp.diff.pair import Checkpoint, config_changes, same_model
from rayexp.diff.statistics import LEVEL, DropVerdict, verdict

if TYPE_CHECKING:
    from rayexp.diff.slices import SlicesReport
    from rayexp.diff.weights import WeightsReport


@dataclass(frozen=True, slots=True)
class PairReport(ABC):
    """What changed from A to B.

    Attributes:
        n: judgements of each side.
        equal: both say the same of all of them.
        not_finite: how many of them are not, in A and in B.
        max_drop: what B may be worse by, in the measure of the kind; None where no verdict was asked.
        level: of the interval that decides; above 95 % where other checkpoints are held against A too.
        letter: what B is called in the verdict.
        noise: what a reseed changes; None where it is not known.
        slices: what changed by attribute; None where it was not asked.
        weights: which tensors moved; None where it was not asked.
    """

    a: Checkpoint
    b: Checkpoint
    n: int = field(kw_only=True)
    equal: bool = field(kw_only=True)
    not_finite: tuple[int, int] = field(kw_only=True)
    max_drop: float | None = field(default=None, kw_only=True)
    level: float = field(default=LEVEL, kw_only=True)
    letter: str = field(default="B", kw_only=True)
    noise: NoiseComparison | None = field(default=None, kw_only=True)
    slices: SlicesReport | None = field(default=None, kw_only=True)
    weights: WeightsReport | None = field(default=None, kw_only=True)

    @abstractmethod
    def held(self, max_drop: float) -> tuple[tuple[float, float] | None, float]:
        """The interval that decides whether B is worse than A by more than `max_drop`, by `level`, in what B is better
        by (None where there is none); and the fall that is allowed in its unit."""

    @property
    def ruling(self) -> DropVerdict | None:
        """May B be worse by `max_drop`? None where none was asked."""
        if self.max_drop is None:
            return None
        interval, allowed = self.held(self.max_drop)
        return verdict(
            interval,
            allowed,
            equal=self.equal,
            n=self.n,
            not_finite=self.not_finite,
            level=self.level,
            letter=self.letter,
        )

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `--json` prints of the two, without slices and weights."""

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {**self.to_json(), **parts(self.slices, self.weights)}

    @property
    def same_model(self) -> bool:
        """Whether both sides have the same weights, bit for bit."""
        return same_model(self.a, self.b)

    @property
    def verdict(self) -> str | None:
        """PASS, FAIL or INCONCLUSIVE against `max_drop`; None where none was asked."""
        return self.ruling.word if self.ruling else None

    def within(self, max_drop: float | None, level: float = LEVEL, letter: str = "B") -> Self:
        """The same report with a verdict by the interval of that level, in which B has that letter."""
        return replace(self, max_drop=max_drop, level=level, letter=letter)

    def beside(self, noise: NoiseComparison | None) -> Self:
        """The same report with what a reseed changes."""
        return replace(self, noise=noise)

    def by(self, slices: SlicesReport | None, weights: WeightsReport | None = None) -> Self:
        """The same report with what changed by attribute, and which tensors moved."""
        return replace(self, slices=slices, weights=weights)

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


def parts(slices: SlicesReport | None, weights: WeightsReport | None) -> dict[str, Any]:
    """The keys for what was asked beside the judgements."""
    found = {"weights": weights, "slices": slices}
    return {name: part.to_json() for name, part in found.items() if part is not None}
