"""What a comparison says in sentences, and the whole of it as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rayexp.display import counted
from rayexp.grid import tables
from rayexp.grid.comparison import PLAIN
from rayexp.grid.families import REPEAT, Family
from rayexp.grid.report import CellReport, CompareReport
from rayexp.grid.statistics import TOO_FEW, Estimate

SCALINGS = {
    "strong": "Strong scaling: the same batch on more devices",
    "weak": "Weak scaling: each worker has the batch",
}


def answers(report: CompareReport) -> Iterator[str]:
    """The report in a few sentences, for each batch size: the fastest cell against the plain script and one device,
    what most devices bring, GPUs against CPUs, exact against ddp, and equal weights."""
    batches = list(dict.fromkeys(entry.cell.batch for entry in report.cells))
    for batch in batches:
        entries = [entry for entry in report.cells if entry.cell.batch == batch]
        of = f"Batch {batch:,}: " if len(batches) > 1 else ""
        yield from (of + sentence for sentence in (*_fastest(report, entries), *_largest(entries), *_gpus(entries)))
    exact = [entry.over_ddp for entry in report.cells if entry.over_ddp is not None]
    if exact:
        low, high = min(e.value for e in exact), max(e.value for e in exact)
        span = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
        yield f"Exact runs at {span} times the rate of ddp in the same place."
    yield from (group.sentence() + "." for group in report.groups)


def _fastest(report: CompareReport, entries: Sequence[CellReport]) -> Iterator[str]:
    """The highest rate beside the plain script and one device. It is called the fastest where its 95 % interval over
    every other one lies above 1: choosing the highest of several needs no wider interval than two do (S. Gutmann, Z.
    Maymin, Ann. Statist. 15 (1987) 456)."""
    ours = [entry for entry in entries if entry.cell.reduction != PLAIN] or list(entries)
    fastest = max(ours, key=_rate)
    against = []
    if fastest.over_plain:
        against.append(f"{_told(fastest.over_plain)} times the plain script")
    one = next((s for s in fastest.scalings if not s.is_reference), None)
    if one:
        against.append(f"{_told(one.speedup)} times {one.reference}")
    times = f": {' and '.join(against)}" if against else ""
    others = [entry for entry in ours if entry is not fastest]
    alike = [other for other in others if not _above(fastest, other)]
    verb, how = "is the fastest," if others else "ran at", ""
    if alike:
        verb = "had the highest rate,"
        how = f", not told apart from {listed([e.cell.id for e in sorted(alike, key=_rate, reverse=True)])}"
    if len(fastest.measured.repeats) == 1:
        how = ", measured once"
    open_ = _open(fastest.rate, fastest.over_plain, one.speedup if one else None)
    yield (
        f"{fastest.cell.id} on {tables.devices(fastest)} {verb} {_told(fastest.rate)} {report.unit} "
        f"per second{how}{times}{open_}."
    )


def _told(estimate: Estimate) -> str:
    """An estimate in a sentence, which says of all in it together where they are open (`_open`)."""
    return tables.number(estimate.value) if estimate.open else tables.between(estimate)


def _open(*estimates: Estimate | None) -> str:
    return f" ({TOO_FEW} how sure)" if any(one is not None and one.open for one in estimates) else ""


def _above(one: CellReport, other: CellReport) -> bool:
    """Whether one is faster than another by more than what differs between runs."""
    bounds = one.rate.over(other.rate).bounds
    return bounds is not None and bounds[0] > 1


def listed(names: Sequence[str], most: int = 2) -> str:
    """`a`, `a and b`, `a, b and 3 others`."""
    if len(names) <= most:
        return " and ".join(names)
    return f"{', '.join(names[:most])} and {counted(len(names) - most, 'other')}"


def _largest(entries: Sequence[CellReport]) -> Iterator[str]:
    """What the most devices of each family bring."""
    by_family: dict[object, list[tuple[CellReport, int]]] = {}
    for entry in entries:
        for i, one in enumerate(entry.scalings):
            by_family.setdefault(one.key, []).append((entry, i))
    for lines in by_family.values():
        entry, i = max(lines, key=lambda line: (line[0].cell.devices, line[0].cell.workers))
        one = entry.scalings[i]
        if one.is_reference:
            continue
        efficiency = ""
        if one.efficiency:
            told = tables.share(one.efficiency.value) if one.efficiency.open else tables.percent(one.efficiency)
            efficiency = f", an efficiency of {told}"
        yield (
            f"{one.key.mode.capitalize()} scaling, {one.key.reduction}: {entry.cell.id} on {tables.devices(entry)} "
            f"does {_told(one.speedup)} times what {one.reference} does{efficiency}{_open(one.speedup)}."
        )


def _gpus(entries: Sequence[CellReport]) -> Iterator[str]:
    gpus = [entry for entry in entries if entry.cell.kind == "gpu"]
    cpus = [entry for entry in entries if entry.cell.kind == "cpu"]
    if not gpus or not cpus:
        return
    cpu = max(cpus, key=_rate)
    fewest = min(entry.cell.devices for entry in gpus)
    one = max((entry for entry in gpus if entry.cell.devices == fewest), key=_rate)
    most = max(gpus, key=_rate)
    for gpu in [one] if one is most else [one, most]:
        times = gpu.rate.over(cpu.rate)
        yield (
            f"{gpu.cell.id} on {tables.devices(gpu)}: {_told(times)} times {cpu.cell.id}, the highest rate without a "
            f"GPU{_open(times)}."
        )


def _rate(entry: CellReport) -> float:
    return entry.rate.value


def laws(report: CompareReport) -> list[str]:
    """A sentence for each law of each family. What one repeat does not allow is said once, among the caveats."""
    return [sentence for family in report.families for sentence in fits(family)]


def links(report: CompareReport) -> list[str]:
    """The same of where the forecasts come from."""
    return [forecast_source(family) for family in report.families if family.why_not != REPEAT]


def fits(family: Family) -> list[str]:
    """One sentence for each law; none where one repeat is why."""
    found = []
    for fit in family.fits:
        if fit.refused == REPEAT:
            continue
        head = f"{fit.law}, {family.name}: "
        if fit.refused:
            found.append(f"{head}no fit; {fit.refused}.")
            continue
        names = ", ".join(
            f"{name} {value:.3g} ({low:.3g} to {high:.3g})"
            for name, (value, low, high) in fit.parameters.items()
            if name != "rate1"
        )
        peak = f"; the rate peaks at {fit.peak:.3g} devices" if fit.peak else ""
        if fit.peak == 1:
            peak = "; the rate falls from the first device on"
        found.append(f"{head}{names}; off by {100 * (fit.error or 0):.1f} % (rms){peak}.")
    return found


def forecast_source(family: Family) -> str:
    """Where a family's forecasts come from and how good such a forecast was at a count that was measured, or why there
    are none."""
    if family.why_not or family.link is None:
        return f"{family.name}: no forecast; {family.why_not}."
    measured = family.link.to_json()
    gbit, micro = measured["bandwidth_gbit"]["value"], measured["latency_us"]["value"]
    check = "; no other count was measured to check it at"
    if family.miss is not None and family.left_out is not None:
        check = (
            f"; made without {counted(family.left_out, 'worker')}, it is off by {100 * family.miss:+.1f} % there, and "
            "the intervals are widened by that"
        )
    link = f"{tables.number(gbit)} Gbit/s and {tables.number(micro)} us ({measured['source']})"
    unsaid = ""
    if family.unsaid:
        unsaid = f"; none for {listed([str(n) for n in family.unsaid], 9)} workers: {TOO_FEW}"
    return f"{family.name}: from {family.base}, {link}{check}{unsaid}."


def machine(report: CompareReport) -> str:
    """One line on machine and versions."""
    e = report.meta["environment"]
    gpus = f", {len(e['gpus'])} x {e['gpus'][0]}" if e["gpus"] else ", no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    return (
        f"{e['cpu']}, {counted(e['cores'], 'core')} ({e['cpu_capability']}), {e['memory_bytes'] / 1e9:.0f} GB{gpus}; "
        f"{e['system']}; Python {e['python']}, {versions}"
    )


def sections(report: CompareReport, narrow: bool = False) -> list[tuple[str, tables.Table]]:
    """The tables that have a line, each with its title."""

    def of(make: Callable[..., tables.Table], *words: str) -> tables.Table:
        return make(report, *words, narrow=narrow)

    found = [("Speed", of(tables.speed))]
    for mode in report.config.mode:
        rows = of(tables.scaling, mode)
        found.append((SCALINGS[mode], rows if len(rows) > 1 else []))
    found += [
        ("Time, memory and cost", of(tables.time_and_cost)),
        ("Compute against communication, a step", of(tables.communication)),
        ("Results", of(tables.results)),
        ("Forecasts: these were NOT measured", of(tables.forecasts)),
    ]
    return [(title, rows) for title, rows in found if rows]


def markdown(report: CompareReport) -> str:
    """The whole report for a paper or a README."""
    parts = [f"# {report.comparison.id}", machine(report), _list(answers(report))]
    if report.warnings:
        parts += ["## Before you believe it", _list(report.warnings)]
    for title, rows in sections(report):
        parts += [f"## {title}", pipe(rows)]
    if said := [*laws(report), *links(report)]:
        parts += ["## Laws and forecasts", _list(said)]
    if report.skipped or report.failed:
        lines = [{"cell": c, "did not run": why} for c, why in report.skipped]
        lines += [{"cell": f"{c}, repeat {r}", "did not run": f"failed: {e}"} for c, r, e in report.failed]
        parts += ["## Not measured", pipe(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _list(sentences: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def pipe(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table; columns that are empty in every row are left out."""
    if not rows:
        return ""
    names = tables.filled(rows)
    lines = ["| " + " | ".join(names) + " |", "|" + "|".join(" --- " for _ in names) + "|"]
    lines += ["| " + " | ".join(row[n].replace("|", "\\|") for n in names) + " |" for row in rows]
    return "\n".join(lines)
