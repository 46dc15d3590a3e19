"""How `rayexp diff` of three checkpoints or more reads on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayexp.cli._diff_more import row, shown, slice_rows, slices_table
from rayexp.cli._output import print_table, tell
from rayexp.diff.outcome import MEASURES, TESTS, UNITS
from rayexp.display import NOT_FINITE, counted, figure

if TYPE_CHECKING:
    from rayexp.diff.pairs import Pair, PairsReport

RESEEDING = {"more": "more", "alike": "no more", "less": "less"}


def show_pairs(r: PairsReport, limit: int) -> None:
    """The checkpoints, a row for every two, the slices of all pairs, and the verdicts."""
    broken = any(r.not_finite)
    print_table(
        [
            {
                "": r.letter(i),
                MEASURES[r.kind]: r.measures[i],
                **({NOT_FINITE: r.not_finite[i]} if broken else {}),
                "checkpoint": c.name,
            }
            for i, c in enumerate(r.checkpoints)
        ],
        f"{r.n:,} validation {r.kind}",
    )
    tell(
        f"{r.changed} of {counted(len(r.pairs), 'pair')} differ by more than chance "
        f"({TESTS[r.kind]}, Benjamini-Hochberg, 5 %)"
    )
    most = max(limit, len(r.checkpoints))
    rows = [
        {"pair": _pair(r, p), **row(p.outcome, MEASURES[r.kind], UNITS[r.kind]), **_more(r, p)} for p in r.pairs[:most]
    ]
    print_table(shown(rows), "from the first to the second", ("p", "95 % interval", MEASURES[r.kind], "weights moved"))
    _left("pairs", len(rows), len(r.pairs))
    _show_floors(r)
    _show_slices(r, limit)
    for p in r.pairs:
        if p.ruling:
            tell(f"{r.letter(p.b)} {p.ruling.word}: {p.ruling.why}")
    if r.verdict:
        tell(f"{r.verdict}: all were allowed to be worse than A by {r.max_drop:g} {r.allowed}")


def _pair(r: PairsReport, p: Pair) -> str:
    return f"{r.letter(p.a)} {r.letter(p.b)}"


def _more(r: PairsReport, p: Pair) -> dict[str, object]:
    found: dict[str, object] = {"p": "none" if p.outcome.p is None else f"{p.outcome.p:.2g}"}
    if r.floors:
        found["than a reseed"] = RESEEDING.get((p.noise and p.noise.verdict) or "", "unknown")
    if p.weights:
        found["weights moved"] = figure(p.weights.relative, ".3g")
    return found


def _show_floors(r: PairsReport) -> None:
    """What another seed changes, at each epoch at which that was measured."""
    for floor in r.floors:
        mean, _, pair = floor.intervals()
        line = f"another seed changes {100 * mean:.1f} % on average"
        line += f" ({counted(len(floor.seeds), 'seed')} at epoch {floor.epoch} of {floor.epochs})"
        if pair:
            line += f", and a further pair of seeds {100 * pair[0]:.1f} to {100 * pair[1]:.1f} % (95 % interval)"
        tell(line)


def _show_slices(r: PairsReport, limit: int) -> None:
    sliced = [(p, p.slices) for p in r.pairs if p.slices]
    if not sliced:
        return
    rows = [{"pair": _pair(r, p), **each} for p, s in sliced for each in slice_rows(s)]
    changed = sum(s.changed for _, s in sliced)
    drop = "churn %", "95 % interval", MEASURES[r.kind]
    slices_table(sliced[0][1], rows, changed, limit, drop, " of all pairs")
    _left("slices", len(rows[:limit]), len(rows))


def _left(what: str, listed: int, count: int) -> None:
    if listed < count:
        tell(f"the first {listed} of {count} {what}; --limit N, --csv FILE, --json or --html FILE show more")
