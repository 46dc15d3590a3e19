"""The table of gpu.py: its lines, and where they were measured."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import language
import torch

HEAD = "| section | what | value | peer | needed | ok | note |\n|" + " --- |" * 7


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        section, what: what was tried.
        value, unit: what came of it; None: nothing.
        ok: whether it is as it must be.
        needed: what `value` must be, and what it should be.
        peer: the peer's figure in the same unit.
        note: the reason, where it is not ok or something else is to be said.
    """

    section: str
    what: str
    value: float | str | None
    unit: str = ""
    ok: bool = True
    needed: str = ""
    peer: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times the peer's figure this one is."""
        return self.value / self.peer if self.peer and isinstance(self.value, float) else None

    def row(self) -> str:
        """A row in Markdown."""
        value = f"{self.value:,.{0 if self.value >= 1000 else 2}f}" if isinstance(self.value, float) else self.value
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x of {self.peer:,.0f}"
        cells = (self.section, self.what, f"{value or ''} {self.unit}".strip(), ratio, self.needed)
        return "| " + " | ".join((*cells, "yes" if self.ok else "NO", self.note.replace("|", "/"))) + " |"


@dataclass(frozen=True)
class Speed:
    """What a speed must be: at least so much, better so much, and so many times the peer's; 0: anything will do."""

    least: int
    aim: int
    times: int

    def __str__(self) -> str:
        times = f"; {self.times}x" if self.times else ""
        return f"{self.least:,}, aim {self.aim:,}{times}" if self.least else ""


def to_json(lines: Sequence[Line], device: torch.device) -> dict[str, Any]:
    """The table as plain values, with date and machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "lines": [{**asdict(line), "ratio": line.ratio} for line in lines],
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what this was measured."""
    found = {**language.machine(), "python": platform.python_version(), "kernel": platform.release()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found
