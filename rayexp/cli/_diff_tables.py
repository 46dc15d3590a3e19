"""How `rayexp diff` reads on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rayexp.cli._diff_more import p_value, show_samples
from rayexp.cli._output import print_table, tell, terminal_width
from rayexp.cli._table import table
from rayexp.display import NOT_FINITE, counted, figure, short

if TYPE_CHECKING:
    from rayexp.diff.churn import ChurnReport
    from rayexp.diff.images_report import ImagesReport
    from rayexp.diff.report import Report
    from rayexp.diff.samples import SamplesReport
    from rayexp.diff.text import TextReport
    from rayexp.diff.weights import WeightsReport

KIND = {"lost": "lost", "gained": "gained", "other_wrong": "other wrong", "not_finite": NOT_FINITE}
MATRIX_EPOCHS = 24  # a wider matrix does not fit a terminal
LISTED_EPOCHS = 60  # of longer runs, as many are listed, evenly spread


def show(report: Report, limit: int) -> None:
    """Everything but noise, slices, weights and the verdict."""
    from rayexp.diff.images_report import ImagesReport
    from rayexp.diff.samples import SamplesReport

    if isinstance(report, ImagesReport):
        show_images(report, limit)
    elif isinstance(report, SamplesReport):
        _show_samples(report, limit)
    else:
        show_text(report, limit)


def _show_samples(report: SamplesReport, limit: int) -> None:
    r = report
    if _same(r):
        return
    sides = zip("AB", r.loss, (r.a, r.b), strict=True)
    print_table(
        [
            {"": side, "loss": loss, **{k: v[i] for k, v in r.metrics.items()}, "checkpoint": checkpoint.name}
            for i, (side, loss, checkpoint) in enumerate(sides)
        ],
        f"{r.n:,} validation {r.unit}",
        drop=tuple(r.metrics),
    )
    _changes(r)
    _not_finite(r, r.unit)
    show_samples(r, limit)


def show_images(report: ImagesReport, limit: int) -> None:
    """Summary, classes, moves and the list, worst first."""
    r = report
    if _same(r):
        return
    print_table(
        [
            {"": side, "acc1 %": acc1, "acc5 %": acc5, "loss": loss, "checkpoint": checkpoint.name}
            for side, acc1, acc5, loss, checkpoint in zip("AB", r.acc1, r.acc5, r.loss, (r.a, r.b), strict=True)
        ],
        counted(r.n, "validation image"),
        drop=("loss", "acc5 %"),
    )
    _changes(r)
    low, high = r.interval
    said = f"acc1 {r.difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
    tell(f"{said}; {p_value(r.mcnemar_p)} (exact McNemar)")
    if r.detectable is None:
        tell("with so few images judged differently, no difference could be told from chance with 80 % power")
    else:
        tell(f"a true difference of {r.detectable:.2f} points would be found by this test with 80 % power at this n")
    print_table(_pairs(r))
    _not_finite(r, "images")
    tell(f"churn {100 * r.churn / r.n:.1f} %: {r.churn:,} predictions changed")
    for kind, (a, b) in r.confidence.items():
        sure = f"median confidence A {figure(a, '.2f')}, B {figure(b, '.2f')}"
        tell(f"  {KIND[kind]:<12} {r.count(kind):>7,}   {sure}")
    if not r.flips:
        return
    tell()
    _classes(r)
    _moves(r)
    _list(r, limit)


def _pairs(r: ImagesReport) -> list[dict[str, str]]:
    """What A and B make of the images: right, wrong, or not finite where there are such."""
    cells = [[f"{count:,}" for count in row] for row in r.table]
    cells[0][1] += " lost"
    cells[1][0] += " gained"
    cells[1][1] += f", {r.other_wrong:,} of them wrong in another way"
    states = ["right", "wrong", *([NOT_FINITE] if r.broken else [])]
    return [
        {"": f"A {was}", **{f"B {now}": cells[i][j] for j, now in enumerate(states)}} for i, was in enumerate(states)
    ]


def _classes(r: ImagesReport) -> None:
    surely = sum(c.adjusted_p < 0.05 for c in r.classes)
    moved = [c for c in r.classes if c.gained != c.lost or c.not_finite]
    shown = moved if len(moved) <= 10 else [*moved[:5], *moved[-5:]]
    if not shown:
        return
    rows = [
        {
            "label": c.label,
            "class": r.words(c.label),
            "n": c.n,
            "A right": c.right_a,
            "B right": c.right_b,
            "lost": c.lost,
            "gained": c.gained,
            **({NOT_FINITE: c.not_finite} if r.broken else {}),
            "adjusted p": f"{c.adjusted_p:.2g}",
        }
        for c in shown
    ]
    tell(f"{surely} of {len(r.classes)} classes changed by more than chance (Benjamini-Hochberg, 5 %)")
    title = "classes with a change" if len(shown) == len(moved) else "classes: the five worst, the five best"
    print_table(rows, title, drop=("adjusted p", "n", "A right", "B right"))


def _moves(r: ImagesReport) -> None:
    rows = [
        {"images": m.count, "class": r.words(m.label), "A": r.words(m.a), "B": r.words(m.b)}
        for m in r.moves[:5]
        if m.count > 1
    ]
    if rows:
        print_table(rows, "largest moves")


def _list(r: ImagesReport, limit: int) -> None:
    rows = [
        {
            "": KIND[f.kind],
            "image": f.name,
            "label": f.label,
            "class": r.words(f.label),
            "A": r.words(f.a),
            "A conf": "" if f.a is None else f"{f.confidence_a:.2f}",
            "B": r.words(f.b),
            "B conf": "" if f.b is None else f"{f.confidence_b:.2f}",
        }
        for f in r.flips[:limit]
    ]
    if rows:
        print_table(
            rows, f"{counted(len(r.flips), 'image')} judged differently, worst first", ("label",), ("B conf", "A conf")
        )
        if len(rows) < len(r.flips):
            tell(f"the first {len(rows):,} of {len(r.flips):,}; --limit N, --csv FILE, --json or --html FILE show more")


def show_text(report: TextReport, limit: int) -> None:
    """Summary, words and tokens."""
    r = report
    if _same(r):
        return
    rows = []
    for i, (side, checkpoint) in enumerate(zip("AB", (r.a, r.b), strict=True)):
        span = _span(r.ppl_interval[i], ".2f") if r.ppl_interval else "none"
        perplexity = figure(r.ppl[i], ".2f")
        rows.append({"": side, "perplexity": perplexity, "95 % interval": span, "checkpoint": checkpoint.name})
    print_table(rows, f"{r.n:,} validation tokens in {len(r.documents):,} {r.unit}", drop=("95 % interval",))
    _changes(r)
    line = f"perplexity x {figure(r.ratio, '.4f')}"
    if not r.broken:
        line += f" ({figure(100 * (r.ratio - 1), '+.2f')} %)"
    if r.ratio_interval and r.paired_p is not None:
        line += f", 95 % interval {_span(r.ratio_interval, '.4f')}; {p_value(r.paired_p)} (sign flips of {r.unit})"
    elif not r.broken:
        line += "; the text is too short for an interval"
    tell(line)
    _not_finite(r, "tokens")
    also = ", or are not finite" if r.broken else ""
    tell(f"churn {100 * r.churn / r.n:.1f} %: {r.churn:,} tokens got more than twice or less than half of A's{also}")
    tell(f"  lost       {r.lost:>9,}")
    tell(f"  gained     {r.gained:>9,}")
    if r.broken:
        tell(f"  {NOT_FINITE} {r.broken:>9,}")
    tell()
    if not r.churn and r.ratio == 1:
        return
    worse = [w for w in r.words[:limit] if w.total > 0]
    better = [w for w in r.words[::-1][:limit] if w.total < 0]
    for words, title in ((worse, "words that B knows worse"), (better, "words that B knows better")):
        if words:
            print_table(
                [
                    {"word": w.word, "count": w.count, "A nats": w.loss_a, "B nats": w.loss_b, "sum": f"{w.total:+.1f}"}
                    for w in words
                ],
                f"{title}, by their part in the total",
            )
    broken = sorted((w for w in r.words if w.not_finite), key=lambda w: -w.not_finite)[:limit]
    if broken:
        print_table(
            [{"word": w.word, "count": w.count, NOT_FINITE: w.not_finite} for w in broken],
            "words without a finite loss; they are in no sum",
        )


def show_churn(report: ChurnReport) -> None:
    """The answer, the epochs, and the matrix where it fits."""
    r = report
    tell(r.answer())
    counts = r.events
    every = max(1, -(-len(r.epochs) // LISTED_EPOCHS))
    listed = [e for i, e in enumerate(r.epochs) if i % every == 0 or e is r.epochs[-1]]
    broken = any(e.not_finite for e in r.epochs)
    print_table(
        [
            {
                "epoch": e.epoch,
                r.metric_name: e.metric,
                "changed %": e.changed,
                "to last %": e.to_last,
                "settled %": e.settled,
                counts[0]: e.forgotten,
                counts[1]: e.learned,
                **({NOT_FINITE: e.not_finite} if broken else {}),
            }
            for e in listed
        ],
        f"{r.run.id}: {r.n:,} validation {r.kind}",
        drop=("to last %", "settled %"),
    )
    if len(listed) < len(r.epochs):
        tell(f"{len(listed)} of {len(r.epochs):,} epochs; --json lists all")
    matrix, width = None, terminal_width(sys.stdout)
    if 1 < len(r.epochs) <= MATRIX_EPOCHS:
        head = [str(e.epoch) for e in r.epochs]
        rows = [
            {"": e.epoch, **dict(zip(head, (f"{v:.0f}" for v in row), strict=True))}
            for e, row in zip(r.epochs, r.matrix.tolist(), strict=True)
        ]
        matrix = table(rows, (), None)[0]
        if width is not None and max(map(len, matrix.splitlines())) > width:
            matrix = None
        else:
            print_table(rows, "churn between every two epochs, percent")
    if matrix is None and len(r.epochs) > 1:
        tell(f"the matrix is in --json and --html. {r.left_out}".strip())


def show_weights(report: WeightsReport, limit: int) -> None:
    """The layers that moved most."""
    if report.equal:
        tell("weights: no tensor moved")
        return
    rows = [
        {"layer": x.name, "weights": f"{x.weights:,}", "|A|": x.norm, "|B-A|": x.moved, "|B-A| / |A|": x.relative}
        for x in report.layers[:limit]
    ]
    tell(f"the weights moved by {figure(report.relative, '.3g')} of their norm")
    if rows:
        print_table(rows, "layers, by relative change", drop=("weights", "|A|", "|B-A|"))
    if len(report.layers) > limit:
        tell(f"the first {limit} of {len(report.layers)} layers; --limit N or --json shows more")
    for side, names in (("A", report.only_a), ("B", report.only_b)):
        if names:
            tell(f"only in {side} (or in another shape): {', '.join(names[:limit])}")


def show_verdict(report: Report) -> None:
    """The last line, for people and for CI logs."""
    from rayexp.diff.images_report import ImagesReport
    from rayexp.diff.samples import SamplesReport

    if report.ruling:
        unit = "percent of perplexity"
        if isinstance(report, ImagesReport):
            unit = "points of acc1"
        elif isinstance(report, SamplesReport):
            unit = f"percent of {report.goal[0]}"
        tell(f"{report.ruling.word}: allowed to get worse by {report.max_drop:g} {unit}; {report.ruling.why}")


def _changes(report: Report) -> None:
    """In what the two runs' configurations differ."""
    from rayexp.diff.pair import config_changes

    changes = config_changes(report.a, report.b)
    if changes:
        tell("configurations differ in " + ", ".join(f"{key} ({a} and {b})" for key, a, b in changes))


def _same(report: Report) -> bool:
    """Say so where both are one model, and whether there is nothing else to say."""
    if report.same_model:
        tell(f"these are the same model: both weights_sha are {short(report.a.weights_sha)}")
        if report.churn == 0:
            return True
    if report.same_model and report.churn > report.broken:
        tell("and yet they were judged differently: on other devices, or with other batches, sums round differently")
    return False


def _not_finite(report: Report, things: str) -> None:
    a, b = report.not_finite
    if report.broken:
        tell(f"NOT FINITE: {a:,} of the {things} in A, {b:,} in B; they differ from everything and are never right")


def _span(interval: tuple[float, float], form: str) -> str:
    return " to ".join(figure(limit, form) for limit in interval)
