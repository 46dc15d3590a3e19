"""The page of `rayexp diff A B --html` for language models: words, documents, and coloured passages."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayexp.diff.changes import Judgements
from rayexp.diff.pair import config_changes
from rayexp.diff.statistics import LEVEL
from rayexp.diff.text import TextReport, WordChange
from rayexp.display import NOT_FINITE, counted, figure
from rayexp.pages.page import p_value, render
from rayexp.pages.plots import interval_plot

SHORTEST, LONGEST = 100, 220  # tokens of a passage; it ends at the end of a line where there is one between
EACH = 20  # passages that got worse, and as many that got better
TYPICAL = 10
WORDS = 25
LEVELS = (math.log(1.25), math.log(2), math.log(4), math.log(16))  # nats at which a colour begins


@dataclass(frozen=True, slots=True)
class Passage:
    """Consecutive tokens: (class of colour, what both said, the word); `kind` is broken, worse, better or typical, and
    `not_finite` how many of the tokens are so in A or B."""

    kind: str
    offset: int
    not_finite: int
    ppl_a: float
    ppl_b: float
    tokens: list[tuple[str, str, str]]


def text_page(report: TextReport) -> str:
    """The page as HTML."""
    percent = None
    if report.ratio_interval:
        low, high = (100 * (x - 1) for x in report.ratio_interval)
        if all(map(math.isfinite, (low, high, report.ratio))):
            # drawn as a fall or rise of perplexity; the bound lies on the other side than that of an accuracy
            bound = None if report.max_drop is None else -report.max_drop
            percent = interval_plot(100 * (report.ratio - 1), (low, high), bound)
    worse = [w for w in report.words[:WORDS] if w.total > 0]
    better = [w for w in report.words[::-1][:WORDS] if w.total < 0]
    return render(
        "diff_text.html.j2",
        r=report,
        lead=lead(report),
        changes=config_changes(report.a, report.b),
        interval=percent,
        shares=_shares(report),
        words=[("worse", "lost", worse, _widest(worse)), ("better", "gained", better, _widest(better))],
        broken_words=sorted((w for w in report.words if w.not_finite), key=lambda w: -w.not_finite)[:WORDS],
        documents=sorted(report.documents, key=lambda d: _rank(d.ppl_a / d.ppl_b)),
        passages=_passages(report),
        legend=legend(),
    )


def lead(r: TextReport) -> str:
    """Which of the two is better, if either, in a sentence."""
    if r.equal:
        return f"A and B give the same probability to every token (perplexity {figure(r.ppl[0], '.2f')})."
    ppl = f"perplexity {figure(r.ppl[0], '.2f')} → {figure(r.ppl[1], '.2f')}"
    if r.broken:
        return f"{counted(r.broken, 'token')} of {r.n:,} have no finite probability, so neither can be called better."
    if r.ratio_interval is None or r.paired_p is None:
        return f"The text is too short to tell which is better ({ppl})."
    low, high = (100 * (x - 1) for x in r.ratio_interval)
    span = f"{100 * (r.ratio - 1):+.2f} %, 95 % interval {low:+.2f} to {high:+.2f} %"
    if r.paired_p >= 1 - LEVEL:
        return f"Neither is shown to be better: {ppl} ({span}), which chance alone may do (p = {p_value(r.paired_p)})."
    better = "B" if r.ratio < 1 else "A"
    return f"{better} is better: {ppl} ({span}), more than chance explains (p = {p_value(r.paired_p)})."


def _rank(x: float) -> float:
    return x if x == x else -1.0


def _widest(words: list[WordChange]) -> float:
    return max((abs(w.total) for w in words if math.isfinite(w.total)), default=1.0) or 1.0


def _rise(r: TextReport) -> NDArray[np.float64]:
    """float64[n]: nats by which each token's loss rose; NaN where a side is not finite."""
    return Judgements.of(r.a.predictions).rise(Judgements.of(r.b.predictions))


def _shares(r: TextReport) -> list[tuple[str, str, int, float]]:
    """Class, words, count and percent of the parts of the text."""
    rise = _rise(r)  # NaN, where a side is not finite, is neither
    worse, better = int((rise > 0).sum()), int((rise < 0).sum())
    parts = [
        *([("broken", "not finite", r.broken)] if r.broken else []),
        ("gained", "probability more than doubled", r.gained),
        ("gained pale", "higher", better - r.gained),
        ("same-wrong", "equal", r.n - worse - better - r.broken),
        ("lost pale", "lower", worse - r.lost),
        ("lost", "less than halved", r.lost),
    ]
    return [(css, words, count, 100 * count / r.n) for css, words, count in parts]


def _passages(r: TextReport) -> list[Passage]:
    """The passages with most tokens that are not finite, those that changed most, each way, and some from all over the
    text, in that order."""
    bounds, rise = _bounds(r), _rise(r)
    total = np.add.reduceat(np.nan_to_num(rise, nan=0.0), bounds[:-1])
    broken = np.add.reduceat(np.isnan(rise).astype(np.int64), bounds[:-1])
    order = np.argsort(-total, kind="stable")
    worst = [int(i) for i in np.argsort(-broken, kind="stable")[:EACH] if broken[i]]
    worse = [int(i) for i in order[:EACH] if total[i] > 0]
    better = [int(i) for i in order[::-1][:EACH] if total[i] < 0]
    spread = np.unique(np.linspace(0, len(total) - 1, TYPICAL).round().astype(int)).tolist()
    chosen = (
        [("broken", i) for i in worst]
        + [("worse", i) for i in worse]
        + [("better", i) for i in better]
        + [("typical", i) for i in spread]
    )
    whole = r.a.predictions.finite & r.b.predictions.finite
    return [_passage(r, whole, kind, int(bounds[i]), int(bounds[i + 1])) for kind, i in chosen]


def _bounds(r: TextReport) -> NDArray[np.int64]:
    """Where passages begin, and the end of the text."""
    token = r.a.predictions["token"]
    n = len(token)
    ends = np.flatnonzero(token == r.vocabulary.index("<eos>")) + 1 if "<eos>" in r.vocabulary else np.empty(0, int)
    bounds = [0]
    while bounds[-1] < n:
        at = bounds[-1]
        next_end = int(np.searchsorted(ends, at + SHORTEST))
        stop = int(ends[next_end]) if next_end < len(ends) else n
        bounds.append(min(stop, at + LONGEST, n))
    if len(bounds) > 2 and n - bounds[-2] < SHORTEST:
        del bounds[-2]  # the rest is no passage of its own
    return np.asarray(bounds, dtype=np.int64)


def _passage(r: TextReport, whole: NDArray[np.bool_], kind: str, start: int, stop: int) -> Passage:
    p, q = r.a.predictions, r.b.predictions
    first, second = (x["loss"][start:stop].astype(np.float64) for x in (p, q))
    words = [r.vocabulary[t] for t in p["token"][start:stop].tolist()]
    tokens = [
        (_colour(y - x), f"A {_probability(x)}, B {_probability(y)}", "↵" if word == "<eos>" else word)
        for word, x, y in zip(words, first.tolist(), second.tolist(), strict=True)
    ]
    with np.errstate(over="ignore"):
        ppl_a, ppl_b = (float(np.exp(x.mean())) for x in (first, second))
    broken = int((~whole[start:stop]).sum())
    return Passage(kind, int(p["offset"][start]), broken, ppl_a, ppl_b, tokens)


def _colour(change: float) -> str:
    """`` w1 .. w4 where B knew worse, b1 .. b4 where it knew better; nf where a side is not finite."""
    if not math.isfinite(change):
        return "nf"
    level = sum(abs(change) > bound for bound in LEVELS)
    return "" if not level else f"{'w' if change > 0 else 'b'}{level}"


def _probability(loss: float) -> str:
    return f"{100 * math.exp(-loss):.2g} %" if math.isfinite(loss) else NOT_FINITE


def legend() -> list[tuple[str, str]]:
    """Colour classes with their meaning, from worst to best."""
    factors = ("1.25", "2", "4", "16")
    worse = [(f"w{i}", f"÷ {f}") for i, f in enumerate(factors, 1)][::-1]
    return [*worse, *((f"b{i}", f"× {f}") for i, f in enumerate(factors, 1))]
