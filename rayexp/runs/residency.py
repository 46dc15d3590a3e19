"""How a run's samples reach a GPU, as run.json has it: kept in its memory, or sent batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Residency:
    """Whether a GPU keeps the samples of training and validation in its memory.

    Attributes:
        kept: whether it does.
        bytes: that they take there, or would take.
        free: bytes of its memory that nobody used before.
        asked: `data.resident`.
    """

    kept: bool
    bytes: int
    free: int
    asked: str | bool

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)

    def __str__(self) -> str:
        size = _size(self.bytes)
        if self.kept:
            return f"{size}, kept in the GPU's memory"
        why = "data.resident is false" if self.asked is False else f"{_size(self.free)} of the GPU's memory is free"
        return f"{size}, sent to the GPU batch by batch ({why})"


def _size(number: int) -> str:
    """Of bytes: `1.28 GB`, `0.27 MB`."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def residency_of(meta: Mapping[str, Any]) -> Residency | None:
    """What run.json says; None on a CPU, where a batch is small, and where an older rayexp has said nothing."""
    try:
        return Residency(**meta["residency"])
    except (KeyError, TypeError):
        return None


def steps_of(meta: Mapping[str, Any]) -> str:
    """How a GPU ran the steps, as run.json says; empty on a CPU."""
    if not (capture := meta.get("capture")):
        return ""
    return "replayed from CUDA graphs" if capture == "graph" else f"launched one by one ({capture})"
