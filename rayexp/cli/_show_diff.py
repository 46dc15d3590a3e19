"""How `rayexp diff` reads on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayexp.cli._shell import print_table

if TYPE_CHECKING:
    from rayexp.analysis.churn import ChurnReport
    from rayexp.analysis.diff import DiffReport
    from rayexp.analysis.text_diff import TextReport
    from rayexp.analysis.weights import WeightsReport

KIND = {"lost": "lost", "gained": "gained", "other_wrong": "other wrong"}
MATRIX_EPOCHS = 24  # a wider matrix does not fit a terminal


def show(report: DiffReport | TextReport, limit: int) -> None:
    """Everything but the verdict."""
    from rayexp.analysis.diff import DiffReport

    if isinstance(report, DiffReport):
        show_images(report, limit)
    else:
        show_text(report, limit)


def show_images(report: DiffReport, limit: int) -> None:
    """Summary, classes, moves and the list, worst first."""
    r = report
    if _same(r):
        return
    print_table(
        [
            {"": side, "acc1 %": acc1, "acc5 %": acc5, "loss": loss, "checkpoint": checkpoint.name}
            for side, acc1, acc5, loss, checkpoint in zip("AB", r.acc1, r.acc5, r.loss, (r.a, r.b), strict=True)
        ],
        f"{r.n:,} validation images",
    )
    _changes(r)
    low, high = r.interval
    print(
        f"acc1 {r.difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}; {_p(r.mcnemar_p)} (exact McNemar)"
    )
    if r.detectable is None:
        print("with so few images judged differently, no difference could be told from chance with 80 % power")
    else:
        print(f"a true difference of {r.detectable:.2f} points would be found with 80 % power at this n")
    print_table(
        [
            {"": "A right", "B right": f"{r.both_right:,}", "B wrong": f"{r.lost:,} lost"},
            {
                "": "A wrong",
                "B right": f"{r.gained:,} gained",
                "B wrong": f"{r.both_wrong:,}, {r.other_wrong:,} of them wrong in another way",
            },
        ]
    )
    print(f"churn {100 * r.churn / r.n:.1f} %: {r.churn:,} predictions changed")
    for kind, (a, b) in r.confidence.items():
        print(f"  {KIND[kind]:<12} {getattr(r, kind):>7,}   median confidence A {a:.2f}, B {b:.2f}")
    if not r.flips:
        return
    print()
    _classes(r)
    _moves(r)
    _list(r, limit)


def _classes(r: DiffReport) -> None:
    surely = sum(c.adjusted_p < 0.05 for c in r.classes)
    moved = [c for c in r.classes if c.gained != c.lost]
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
            "adjusted p": f"{c.adjusted_p:.2g}",
        }
        for c in shown
    ]
    print(f"{surely} of {len(r.classes)} classes changed by more than chance (Benjamini-Hochberg, 5 %)")
    print_table(rows, "classes with a change" if len(shown) == len(moved) else "classes: the five worst, the five best")


def _moves(r: DiffReport) -> None:
    rows = [
        {"images": m.count, "class": r.words(m.label), "A": r.words(m.a), "B": r.words(m.b)}
        for m in r.moves[:5]
        if m.count > 1
    ]
    if rows:
        print_table(rows, "largest moves")


def _list(r: DiffReport, limit: int) -> None:
    rows = [
        {
            "": KIND[f.kind],
            "image": f.name,
            "label": f.label,
            "class": r.words(f.label),
            "A": r.words(f.a),
            "A conf": f"{f.confidence_a:.2f}",
            "B": r.words(f.b),
            "B conf": f"{f.confidence_b:.2f}",
        }
        for f in r.flips[:limit]
    ]
    if rows:
        print_table(rows, f"{len(r.flips):,} images judged differently, worst first")
        if len(rows) < len(r.flips):
            print(
                f"the first {len(rows):,} of {len(r.flips):,}; --limit N, --csv FILE, --json or --html FILE show more"
            )


def show_text(report: TextReport, limit: int) -> None:
    """Summary, words and tokens."""
    r = report
    if _same(r):
        return
    rows = []
    for i, (side, checkpoint) in enumerate(zip("AB", (r.a, r.b), strict=True)):
        span = f"{r.ppl_interval[i][0]:.2f} to {r.ppl_interval[i][1]:.2f}" if r.ppl_interval else "none"
        rows.append({"": side, "perplexity": f"{r.ppl[i]:.2f}", "95 % interval": span, "checkpoint": checkpoint.name})
    print_table(rows, f"{r.n:,} validation tokens in {len(r.documents):,} {r.unit}")
    _changes(r)
    line = f"perplexity x {r.ratio:.4f} ({100 * (r.ratio - 1):+.2f} %)"
    if r.ratio_interval and r.paired_p is not None:
        low, high = r.ratio_interval
        line += f", 95 % interval {low:.4f} to {high:.4f}; {_p(r.paired_p)} (sign flips of {r.unit})"
    else:
        line += "; the text is too short for an interval"
    print(line)
    print(
        f"churn {100 * r.churn / r.n:.1f} %: {r.churn:,} tokens got more than twice or less than half the probability"
    )
    print(f"  lost   {r.lost:>9,}")
    print(f"  gained {r.gained:>9,}\n")
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


def show_churn(report: ChurnReport) -> None:
    """The answer, the epochs, and the matrix where it fits."""
    r = report
    print(r.answer())
    words = ("forgotten", "learned") if r.kind == "images" else ("halved", "doubled")
    print_table(
        [
            {
                "epoch": e.epoch,
                r.metric_name: e.metric,
                "changed %": e.changed,
                "to last %": e.to_last,
                "settled %": e.settled,
                words[0]: e.forgotten,
                words[1]: e.learned,
            }
            for e in r.epochs
        ],
        f"{r.run.id}: {r.n:,} validation {r.kind}",
    )
    if 1 < len(r.epochs) <= MATRIX_EPOCHS:
        head = [str(e.epoch) for e in r.epochs]
        rows = [
            {"": e.epoch, **dict(zip(head, (f"{v:.0f}" for v in row), strict=True))}
            for e, row in zip(r.epochs, r.matrix.tolist(), strict=True)
        ]
        print_table(rows, "churn between every two epochs, percent")
    elif len(r.epochs) > 1:
        print(f"the matrix of {len(r.epochs)} epochs is in --json and --html")


def show_weights(report: WeightsReport, limit: int) -> None:
    """The layers that moved most."""
    if report.equal:
        print("weights: no tensor moved")
        return
    rows = [
        {"layer": x.name, "weights": f"{x.weights:,}", "|A|": x.norm, "|B-A|": x.moved, "|B-A| / |A|": x.relative}
        for x in report.layers[:limit]
    ]
    print(f"the weights moved by {report.relative:.3g} of their norm")
    if rows:
        print_table(rows, "layers, by relative change")
    if len(report.layers) > limit:
        print(f"the first {limit} of {len(report.layers)} layers; --limit N or --json shows more")
    for side, names in (("A", report.only_a), ("B", report.only_b)):
        if names:
            print(f"only in {side} (or in another shape): {', '.join(names[:limit])}")


def show_verdict(report: DiffReport | TextReport) -> None:
    """The last line, for people and for CI logs."""
    if report.verdict:
        unit = "points of acc1" if hasattr(report, "acc1") else "percent of perplexity"
        print(f"{report.verdict}: allowed to get worse by {report.max_drop:g} {unit}")


def _changes(report: DiffReport | TextReport) -> None:
    """In what the two runs' configurations differ."""
    from rayexp.analysis.pair import config_changes

    changes = config_changes(report.a, report.b)
    if changes:
        print("configurations differ in " + ", ".join(f"{key} ({a} and {b})" for key, a, b in changes))


def _same(report: DiffReport | TextReport) -> bool:
    """Say so where both are one model, and whether there is nothing else to say."""
    if report.same_model:
        print(f"these are the same model: both weights_sha are {report.a.weights_sha[:16]}")
        if report.churn == 0:
            return True
        print("and yet they were judged differently: on other devices, or with other batches, sums round differently")
    return False


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value >= 1e-300 else "p < 1e-300"
