"""How the further answers of `rayexp diff` read on a terminal: samples, noise, slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayexp.cli._output import print_table, tell
from rayexp.display import NOT_FINITE, counted, figure

if TYPE_CHECKING:
    from rayexp.diff.noise import NoiseComparison, NoiseFloor
    from rayexp.diff.outcome import Outcome
    from rayexp.diff.samples import SamplesReport
    from rayexp.diff.slices import SlicesReport


def show_samples(r: SamplesReport, limit: int) -> None:
    """Losses, the tests, and the list, worst first; what is shown before them is the caller's."""
    if r.interval and r.wilcoxon_p is not None:
        low, high = r.interval
        tell(
            f"mean loss {r.difference:+.4g}, 95 % interval {low:+.4g} to {high:+.4g} (paired t); "
            f"{p_value(r.wilcoxon_p)} (Wilcoxon's signed ranks)"
        )
    tell(f"churn {100 * r.churn / r.n:.1f} %: the loss of {r.churn:,} {r.unit} moved by more than {r.tolerance:.3g}")
    tell(f"  lost (rose)    {r.lost:>9,}")
    tell(f"  gained (fell)  {r.gained:>9,}")
    if r.broken:
        tell(f"  {NOT_FINITE:<14} {r.broken:>9,}")
    tell()
    rows = [
        {
            "": NOT_FINITE if f.kind == "not_finite" else f.kind,
            "name": f.name,
            "A loss": figure(f.loss_a),
            "B loss": figure(f.loss_b),
            "B - A": "" if f.kind == "not_finite" else figure(f.loss_b - f.loss_a, "+.4g"),
        }
        for f in r.flips[:limit]
    ]
    if rows:
        print_table(rows, f"{counted(r.churn, 'loss', 'losses')} that moved, worst first", ("B - A",))
        if len(rows) < r.churn:
            tell(f"the first {len(rows):,} of {r.churn:,}; --limit N, --csv FILE, --json or --html FILE show more")


def show_noise(n: NoiseComparison | None) -> None:
    """The comparison beside a noise floor."""
    if n is None:
        return
    tell(f"{n.headline}: {n.sentence()}")
    if said := n.difference_sentence():
        tell(said)


def show_floor(floor: NoiseFloor, measure: str) -> None:
    """The seeds, what every two change, and what a further pair would."""
    rows = [
        {"seed": seed, "run": run, measure: value}
        for seed, run, value in zip(floor.seeds, floor.runs, floor.values.tolist(), strict=True)
    ]
    print_table(rows, f"{counted(len(rows), 'seed')} at epoch {floor.epoch} of {floor.epochs}")
    print_table(
        [{"seeds": f"{i} and {j}", "changed": f"{c:,}", "%": f"{100 * c / floor.n:.1f}"} for i, j, c in floor.pairs()],
        f"judgements that differ, of {floor.n:,}",
    )
    mean, of_mean, of_pair = floor.intervals()
    line = f"another seed changes {100 * mean:.1f} % of the judgements on average"
    if of_mean and of_pair:
        line += (
            f" (95 % interval {_percent(of_mean)}); a further pair of seeds differs by {_percent(of_pair)} "
            "(95 % interval)"
        )
    tell(line)
    reach = floor.reach()
    if reach is not None:
        tell(f"{measure} of two further seeds differs by up to {reach:.3g} (95 %)")


def _percent(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def show_slices(s: SlicesReport, limit: int) -> None:
    """A row for each slice."""
    rows = slice_rows(s)
    slices_table(s, rows, s.changed, limit, ("p", "churn %", "95 % interval"))
    if len(rows) > limit:
        tell(f"the first {limit} of {len(rows)} slices; --limit N, --json or --html FILE show more")


def slice_rows(s: SlicesReport) -> list[dict[str, object]]:
    from rayexp.diff.outcome import MEASURES, UNITS

    return [
        {"attribute": x.attribute, "value": x.value, **row(x.outcome, MEASURES[s.kind], UNITS[s.kind])}
        for x in s.slices
    ]


def slices_table(
    s: SlicesReport, rows: list[dict[str, object]], changed: int, limit: int, drop: Sequence[str], of: str = ""
) -> None:
    """How many slices changed, what the file leaves out, and the first rows; `s` knows the file."""
    from rayexp.diff.outcome import TESTS

    tell()
    tell(
        f"{changed} of {counted(len(rows), 'slice')}{of} changed by more than chance "
        f"({TESTS[s.kind]}, Benjamini-Hochberg, 5 %)"
    )
    if s.note():
        tell(s.note())
    print_table(shown(rows[:limit]), f"slices of {s.source}", drop)


def row(o: Outcome, measure: str, unit: str) -> dict[str, object]:
    interval = f"{o.interval[0]:+.3g} to {o.interval[1]:+.3g}" if o.interval else "none"
    return {
        "n": f"{o.n:,}",
        measure: f"{figure(o.a)} to {figure(o.b)}",
        f"change {unit}".strip(): figure(o.difference, "+.3g"),
        "95 % interval": interval,
        "churn %": f"{100 * o.churn / o.n:.1f}",
        "lost": o.lost,
        "gained": o.gained,
        NOT_FINITE: o.not_finite,
        "adjusted p": "none" if o.adjusted_p is None else f"{o.adjusted_p:.2g}",
    }


def shown(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The rows without the column of what is not finite, where everything is."""
    if any(row[NOT_FINITE] for row in rows):
        return rows
    return [{k: v for k, v in row.items() if k != NOT_FINITE} for row in rows]


def p_value(value: float) -> str:
    """`p = 0.034`."""
    return f"p = {value:.2g}" if value >= 1e-300 else "p < 1e-300"
