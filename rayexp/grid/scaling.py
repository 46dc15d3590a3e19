"""What more devices bring: speed-up, efficiency and serial fraction of the cells of a family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayexp.grid.families import FamilyKey, by_family
from rayexp.grid.measured import Measured
from rayexp.grid.statistics import TOO_FEW, Estimate, Interval, karp_flatt

MORE_THAN_LINEAR = "more than linear: it computes with more than its devices say, or {one} was slowed down when it ran"
BY_CHANCE = f"above 100 %, perhaps by chance: {TOO_FEW}"

ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class SerialFraction:
    """Karp and Flatt's serial fraction and its 95 % interval, which follows from that of the speed-up; None where there
    is none, and where it would reach from 0 to 1."""

    value: float
    interval: Interval | None

    def to_json(self) -> dict[str, float | None]:
        """`value`, `low`, `high`."""
        low, high = self.interval or (None, None)
        return {"value": self.value, "low": low, "high": high}


@dataclass(frozen=True, slots=True)
class Scaling:
    """A cell beside the smallest one of its family.

    Attributes:
        key: the family.
        cell: id of the cell.
        reference: id of the family's cell with the fewest devices; of several, the fastest.
        speedup: samples per second over those of the reference. With weak scaling, where n workers do n times the work,
            that is the scaled speed-up (J. Gustafson, Communications of the ACM 31 (1988) 532).
        efficiency: speed-up over the ratio of devices, at most 1; with weak scaling the scaled one, which where workers
            have equal devices is the reference's time of a step over the cell's. None where it cannot be, see
            `impossible`.
        serial: strong scaling only; None for the reference and where it cannot be, below 0 or above 1.
        impossible: why a figure is left out, or None.
    """

    key: FamilyKey
    cell: str
    reference: str
    speedup: Estimate
    efficiency: Estimate | None
    serial: SerialFraction | None
    impossible: str | None

    @property
    def is_reference(self) -> bool:
        """Whether the cell is compared with itself."""
        return self.cell == self.reference

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "mode": self.key.mode,
            "reference": self.reference,
            "speedup": self.speedup.to_json(),
            "efficiency": self.efficiency and self.efficiency.to_json(),
            "karp_flatt": self.serial and self.serial.to_json(),
            "left_out_because": self.impossible,
        }


def scalings(measured: Sequence[Measured], rates: Mapping[str, Estimate]) -> list[Scaling]:
    """Every cell of every family beside the family's smallest; `rates` by cell id."""
    found = []
    for key, members in by_family(measured).items():
        one = min(members, key=lambda m: (m.cell.devices, -rates[m.cell.id].value))
        found += [_scaling(key, m, one, rates) for m in members]
    return found


def _scaling(key: FamilyKey, m: Measured, one: Measured, rates: Mapping[str, Estimate]) -> Scaling:
    if m is one:
        whole = Estimate(1.0)
        return Scaling(key, m.cell.id, m.cell.id, whole, whole, None, None)
    p = m.cell.devices / one.cell.devices
    speedup = rates[m.cell.id].over(rates[one.cell.id])
    efficiency = speedup.times(1 / p)
    impossible = None
    low, _ = efficiency.bounds or (0.0, 0.0)
    if low > 1 + ROUNDING:  # noise does not explain it
        impossible = MORE_THAN_LINEAR.format(one=one.cell.id)
    elif efficiency.interval is None and efficiency.value > 1 + ROUNDING:
        impossible = BY_CHANCE
    serial = None
    if key.mode == "strong" and p > 1:
        value = float(karp_flatt(speedup.value, p))
        bounds = None
        if speedup.interval:
            least, most = speedup.interval
            bounds = max(float(karp_flatt(most, p)), 0.0), min(float(karp_flatt(least, p)), 1.0)
            bounds = None if bounds == (0.0, 1.0) else bounds  # anything it could be
        serial = SerialFraction(value, bounds) if -ROUNDING <= value <= 1 else None
    return Scaling(key, m.cell.id, one.cell.id, speedup, None if impossible else efficiency, serial, impossible)
