"""What makes the figures of a comparison less than they seem: a busy machine, repeats that differ, idle devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayexp.display import counted
from rayexp.grid.families import REPEAT
from rayexp.grid.measured import Measured
from rayexp.grid.scaling import Scaling
from rayexp.grid.statistics import TOO_FEW

LOADED = 0.25  # of the machine's cores: more work of others disturbs
SPREAD = 0.15  # relative, between the repeats of a cell
IDLE = 0.5


def caveats(meta: Mapping[str, Any], measured: Sequence[Measured], beside: Sequence[Scaling]) -> Iterator[str]:
    """A sentence for each.

    Args:
        meta: compare.json.
        measured: the cells.
        beside: each cell beside the smallest of its family.
    """
    loads = [load for load in meta.get("others", ()) if load["cores"] > LOADED * load["of"]]
    if loads:
        most = max(loads, key=lambda load: load["cores"] / load["of"])
        yield (
            f"the machine was busy with other work when the comparison began: {most['cores']:.1f} of its "
            f"{counted(most['of'], 'core')}; measure again on a quiet one"
        )
    lone = [m.cell.id for m in measured if len(m.repeats) < 2]
    if lone:
        whose = "" if len(lone) == len(measured) else f" for {', '.join(lone)}"
        yield f"no intervals and no forecasts{whose}: {REPEAT}"
    rates = [m.cell.id for m in measured if m.rate().open]
    speedups = [one.cell for one in beside if one.speedup.open]
    wide = [f"the {what} of {', '.join(cells)}" for what, cells in (("rate", rates), ("speed-up", speedups)) if cells]
    if wide:
        yield f"{TOO_FEW}, since the interval would reach over more than a factor of ten: {' and '.join(wide)}"
    apart = [f"{m.cell.id} by {100 * m.spread():.0f} %" for m in measured if m.spread() > SPREAD]
    if apart:
        yield f"repeats differ, so something disturbed them: {', '.join(apart)}"
    looks = [(m.cell.id, *busy) for m in measured if (busy := m.busy()) and busy[0] < IDLE]
    for source in dict.fromkeys(source for _, _, source in looks):
        idle = [f"{cell} {100 * (1 - share):.0f} %" for cell, share, by in looks if by == source]
        yield f"devices idle more than half of the time (by {source}): {', '.join(idle)}"
    yield from (f"no efficiency for {one.cell}: {one.impossible}" for one in beside if one.impossible)
