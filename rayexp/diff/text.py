"""What do two language models think of the same text? Perplexities, words, passages.

There is no right or wrong token; `lost` are the tokens to which B gives less than half of A's probability, `gained`
those to which it gives more than twice as much, `not_finite` those to which A, B or both give no finite loss (the rule:
`changes`), and churn = lost + gained + not_finite. Inference is by whole documents, because neighbouring tokens
are not independent.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.diff.changes import KINDS, Judgements, tally, worst_first
from rayexp.diff.documents import MIN_DOCUMENTS, bootstrap, documents, perplexity, sign_flip
from rayexp.diff.pair import Checkpoint, check, equal
from rayexp.diff.pair_report import PairReport
from rayexp.diff.statistics import LEVEL
from rayexp.display import csv_cell, plain
from rayexp.errors import UserError
from rayexp.runs.records import Predictions

LISTED = 1000  # tokens in the report's `flips`


@dataclass(frozen=True, slots=True)
class WordChange:
    """One word: how often it occurs, how many of these are not finite in A or B, and of the others the mean loss (nats)
    in A and B, and `total`, the sum of B - A. NaN and 0 where none is finite."""

    word: str
    count: int
    not_finite: int
    loss_a: float
    loss_b: float
    total: float


@dataclass(frozen=True, slots=True)
class TokenFlip:
    """One token whose probability more than doubled (`gained`) or halved (`lost`), or that has none (`not_finite`)."""

    offset: int
    word: str
    kind: str
    loss_a: float
    loss_b: float


@dataclass(frozen=True, slots=True)
class DocumentChange:
    """One document: its title (blocks: its first offset), its tokens, how many of them are not finite in A or B, and
    its perplexities, which are then not finite either."""

    title: str
    count: int
    not_finite: int
    ppl_a: float
    ppl_b: float


@dataclass(frozen=True, slots=True)
class TextReport(PairReport):
    """What changed from A to B on n tokens.

    `ppl` and its intervals are perplexities; `ratio` is ppl(B) / ppl(A) with its interval, which holds 1 if and only if
    `paired_p` is not below 5 %. Intervals are None where the text has too few documents, or a loss is not finite.
    `words` are by `total`, those that got worse first. `broken` are the tokens without a finite loss in A or in B.
    """

    vocabulary: tuple[str, ...]
    ppl: tuple[float, float]
    ppl_interval: tuple[tuple[float, float], tuple[float, float]] | None
    ratio: float
    ratio_interval: tuple[float, float] | None
    paired_p: float | None
    documents: tuple[DocumentChange, ...]
    unit: str
    gained: int
    lost: int
    broken: int
    words: tuple[WordChange, ...]
    flips: tuple[TokenFlip, ...]

    @property
    def churn(self) -> int:
        """Tokens whose probability more than doubled or halved, or that have none."""
        return self.gained + self.lost + self.broken

    def held(self, max_drop: float) -> tuple[tuple[float, float] | None, float]:
        """In percent of A's perplexity."""
        interval = self.ratio_interval
        if interval and self.level != LEVEL:
            interval = _ratio_interval(*_documents_of(self.a, self.b, self.vocabulary)[:2], self.level)[1]
        better = interval and (100 * (1 - interval[1]), 100 * (1 - interval[0]))
        return better or None, max_drop

    def to_json(self) -> dict[str, Any]:
        """The keys that scripts may rely on: n, ppl, churn, gained, lost, paired_p, flips (the largest 1,000)."""
        intervals = self.ppl_interval
        report = {
            "kind": "tokens",
            **self.sides(),
            "equal": self.equal,
            "n": self.n,
            "ppl": {"a": self.ppl[0], "b": self.ppl[1]},
            "ppl_interval": intervals and {"a": intervals[0], "b": intervals[1]},
            "ratio": self.ratio,
            "ratio_interval": self.ratio_interval,
            "level": LEVEL,
            "paired_p": self.paired_p,
            "document_unit": self.unit,
            "documents": [_fields(d) for d in self.documents],
            "churn": self.churn,
            "churn_rate": self.churn / self.n,
            "gained": self.gained,
            "lost": self.lost,
            "not_finite": {"a": self.not_finite[0], "b": self.not_finite[1], "either": self.broken},
            **self.decision(),
            "words": [_fields(w) for w in self.words],
            "flips": [_fields(f) for f in self.flips],
        }
        return dict(plain(report))

    def to_csv(self) -> str:
        """Every token that moved by more than a factor of two or is not finite, the worst first."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("offset", "word", "kind", "a_loss", "b_loss"))
        for f in _flips(self.a, self.b, self.vocabulary, None):
            writer.writerow((f.offset, csv_cell(f.word), f.kind, f"{f.loss_a:.6f}", f"{f.loss_b:.6f}"))
        return out.getvalue()


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def diff_text(a: Checkpoint, b: Checkpoint) -> TextReport:
    """Compare two language models' losses on the same tokens.

    Raises:
        UserError: the text or the vocabulary is not the same.
    """
    check(a, b)
    vocabulary = vocabulary_of(a, b)
    p, q = a.predictions, b.predictions
    if not np.array_equal(p["token"], q["token"]):
        raise UserError(f"{a.name} and {b.name} read different tokens; one of them is damaged")
    losses = np.stack([p["loss"], q["loss"]]).astype(np.float64)
    n = losses.shape[1]
    changes = Judgements.of(p).changes(Judgements.of(q))
    counts, whole = tally(changes), p.finite & q.finite
    with np.errstate(invalid="ignore"):  # inf - inf
        mean_change = (losses[1] - losses[0]).mean()
    sums, size, document, unit = _documents_of(a, b, vocabulary)
    count = len(size)
    tested = count >= 2 and bool(whole.all())
    intervals = bootstrap(sums, size) if tested and count >= MIN_DOCUMENTS else None
    p_value, interval = _ratio_interval(sums, size) if tested else (None, None)
    return TextReport(
        a=a,
        b=b,
        vocabulary=vocabulary,
        n=n,
        ppl=(perplexity(losses[0].mean()), perplexity(losses[1].mean())),
        ppl_interval=intervals,
        ratio=perplexity(mean_change),
        ratio_interval=interval,
        paired_p=p_value,
        documents=_documents(p, document, sums, size, np.bincount(document[~whole], minlength=count), vocabulary, unit),
        unit=unit,
        gained=counts["gained"],
        lost=counts["lost"],
        not_finite=(int((~p.finite).sum()), int((~q.finite).sum())),
        broken=counts["not_finite"],
        equal=equal(a, b, sum(counts.values())),
        words=_words(p["token"], losses, whole, vocabulary),
        flips=_flips(a, b, vocabulary, LISTED),
    )


def _documents_of(
    a: Checkpoint, b: Checkpoint, vocabulary: tuple[str, ...]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], str]:
    """float64[2, documents], the summed losses of A and of B; tokens of each document, and what `documents` says."""
    p, q = a.predictions, b.predictions
    document, count, unit = documents(p["token"], p["offset"], vocabulary)
    losses = (x["loss"].astype(np.float64) for x in (p, q))
    sums = np.stack([np.bincount(document, weights=row, minlength=count) for row in losses]).astype(np.float64)
    return sums, np.bincount(document, minlength=count), document, unit


def _ratio_interval(
    sums: NDArray[np.float64], size: NDArray[np.int64], level: float = LEVEL
) -> tuple[float, tuple[float, float] | None]:
    """The p of the paired test, and the interval of the ratio of perplexities."""
    p_value, found = sign_flip(sums[1] - sums[0], size, level)
    return p_value, found and (perplexity(found[0]), perplexity(found[1]))


def vocabulary_of(a: Checkpoint, b: Checkpoint) -> tuple[str, ...]:
    """The words of both (UserError where they are not the same)."""
    lists = []
    for side in (a, b):
        words = side.run.data().get("vocabulary")
        if not isinstance(words, list):
            raise UserError(f"{side.run.data_path}: `vocabulary`, a list of words, is expected")
        lists.append(tuple(map(str, words)))
        largest = int(side.predictions["token"].max())
        if largest >= len(words) or int(side.predictions["token"].min()) < 0:
            raise UserError(f"{side.run.data_path}: has {len(words):,} words, but {side.name} names word {largest}")
    if lists[0] != lists[1]:
        where = next((i for i, (x, y) in enumerate(zip(*lists, strict=False)) if x != y), min(map(len, lists)))
        raise UserError(
            f"{a.name} and {b.name} have different vocabularies ({len(lists[0]):,} and {len(lists[1]):,} words, "
            f"the first difference at word {where}): their perplexities cannot be compared"
        )
    return lists[0]


def _documents(
    p: Predictions,
    document: NDArray[np.int64],
    sums: NDArray[np.float64],
    size: NDArray[np.int64],
    broken: NDArray[np.int64],
    vocabulary: tuple[str, ...],
    unit: str,
) -> tuple[DocumentChange, ...]:
    titles = titles_of(p, document, len(size), vocabulary, unit)
    mean = sums / size
    return tuple(
        DocumentChange(titles[i], int(size[i]), int(broken[i]), perplexity(mean[0, i]), perplexity(mean[1, i]))
        for i in range(len(size))
    )


def titles_of(
    p: Predictions, document: NDArray[np.int64], count: int, vocabulary: tuple[str, ...], unit: str
) -> list[str]:
    """The titles of the articles; `from token 1,200` of blocks, and where there is none.

    Args:
        document: int64[n], see `documents`, which also gives `count` and `unit`.
    """
    titles = []
    for first in np.searchsorted(document, np.arange(count)).tolist():
        title = f"from token {p['offset'][first]:,}"
        if unit == "articles":
            words = [vocabulary[t] for t in p["token"][first : first + 40].tolist()]
            at = words.index("=") if "=" in words else 0
            line = words[at : words.index("<eos>", at)] if "<eos>" in words[at:] else words
            title = " ".join(line).strip("= ") or title
        titles.append(title)
    return titles


def _words(
    token: NDArray[Any], losses: NDArray[np.float64], whole: NDArray[np.bool_], vocabulary: tuple[str, ...]
) -> tuple[WordChange, ...]:
    """The words of the text, by how much their summed loss moved: the largest rise first, the largest fall last.

    Args:
        whole: bool[n], the tokens that are finite in both; losses are summed over these.
    """
    total, count = (np.bincount(x, minlength=len(vocabulary)) for x in (token, token[whole]))
    a, b = (np.bincount(token[whole], weights=row[whole], minlength=len(vocabulary)) for row in losses)
    seen = np.flatnonzero(total)
    order = seen[np.lexsort((seen, -(b - a)[seen]))]
    columns = (order, total[order], (total - count)[order], count[order], a[order], b[order])
    return tuple(
        WordChange(vocabulary[i], n, broken, x / c if c else math.nan, y / c if c else math.nan, y - x)
        for i, n, broken, c, x, y in zip(*(column.tolist() for column in columns), strict=True)
    )


def _flips(a: Checkpoint, b: Checkpoint, vocabulary: tuple[str, ...], limit: int | None) -> tuple[TokenFlip, ...]:
    p, q = a.predictions, b.predictions
    moved, kinds = worst_first(Judgements.of(p), Judgements.of(q), limit)
    columns = (p["offset"][moved], p["token"][moved], kinds, p["loss"][moved], q["loss"][moved])
    return tuple(
        TokenFlip(offset, vocabulary[word], KINDS[kind], x, y)
        for offset, word, kind, x, y in zip(*(c.tolist() for c in columns), strict=True)
    )
