"""Documents of a text, and what may be inferred from them: intervals and a paired test that draw whole documents.

Neighbouring tokens are not independent, documents are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.diff.statistics import LEVEL

DRAWS = 5000
SEED = 0
MIN_DOCUMENTS = 10  # with fewer, the text is cut into blocks instead
MAX_BLOCKS = 200


def perplexity(loss: Any) -> float:
    """exp of a mean loss in nats; infinity where that is too large for a float64."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(loss)))


def documents(
    token: NDArray[Any], offset: NDArray[Any], vocabulary: tuple[str, ...]
) -> tuple[NDArray[np.int64], int, str]:
    """To which document each token belongs, the number of documents, and what they are: `articles` or `blocks`.

    An article begins at a line ` = Title = ` (one `=` on each side, as WikiText writes them; ` = = Section = = ` is
    none). Text with fewer than MIN_DOCUMENTS articles is cut into MAX_BLOCKS blocks of equal length, of 50 tokens
    at least.
    """
    ids = {word: i for i, word in enumerate(vocabulary)}
    starts = np.empty(0, dtype=np.int64)
    if "=" in ids and "<eos>" in ids:
        starts = _headings(token, offset, ids["="], ids["<eos>"])
    if len(starts) >= MIN_DOCUMENTS:
        belongs = np.maximum(np.searchsorted(starts, np.arange(len(token)), side="right") - 1, 0)
        return belongs, len(starts), "articles"  # what stands before the first heading counts to the first article
    n = len(token)
    count = max(1, min(MAX_BLOCKS, n // 50))
    return np.arange(n) * count // n, count, "blocks"


def _headings(token: NDArray[Any], offset: NDArray[Any], equals: int, eos: int) -> NDArray[np.int64]:
    """Positions of the first `=` of each title line."""
    ends = np.flatnonzero(token == eos)
    begins = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else np.empty(0, dtype=np.int64)
    # the line's first token may lack a prediction (nothing stands before the text's very first token)
    whole = (ends - begins >= 3) & (offset[ends] - offset[begins] == ends - begins)
    begins, ends = begins[whole], ends[whole]
    title = (token[begins] == equals) & (token[begins + 1] != equals)
    title &= (token[ends - 1] == equals) & (token[ends - 2] != equals)
    return np.asarray(begins[title])


def bootstrap(
    sums: NDArray[np.float64], size: NDArray[np.int64], level: float = LEVEL
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Expanded percentile intervals of ppl(A) and ppl(B).

    Documents are drawn with replacement; the mean loss of a draw is its summed loss over its tokens. B. Efron, R.
    Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Of few documents the plain percentiles are too
    narrow: they take the spread among these for the true one. Their tails are therefore those with which the interval
    of a normal mean is Student's (T. Hesterberg, The American Statistician 69 (2015) 371). The seed is fixed, so the
    same pair gives the same interval.

    Args:
        sums: float64[2, documents], summed loss of A and of B, in nats; of MIN_DOCUMENTS or more.
        size: int64[documents], tokens.
        level: of the intervals.
    """
    from scipy.special import ndtr, stdtrit

    count = len(size)
    rng = np.random.default_rng(SEED)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float64)
    tokens = drawn @ size
    tail = float(ndtr(-math.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 + level) / 2)))
    tails = [tail, 1 - tail]

    def interval(total: NDArray[np.float64]) -> tuple[float, float]:
        low, high = np.quantile(drawn @ total / tokens, tails)
        return perplexity(low), perplexity(high)

    return interval(sums[0]), interval(sums[1])


def sign_flip(
    change: NDArray[np.float64], size: NDArray[np.int64], level: float = LEVEL
) -> tuple[float, tuple[float, float] | None]:
    """Paired randomisation test: where A and B are alike, each document's change may as well have had the other sign.

    Its two-sided p, and the interval of the change per token: all shifts d that the same test, of change - d * size,
    does not reject. So the interval holds 0 if and only if p is at least 1 - level. A set of signs s counts against d
    where |s (change - d size)| >= |sum(change - d size)|, which is so for all d between two roots; the limits are
    order statistics of these roots. E. S. Edgington, Randomization Tests (1980); inverted: J. S. Maritz,
    Distribution-Free Statistical Methods (1981). The observed signs count as one draw, (1 + hits) / (1 + draws): B.
    Phipson, G. K. Smyth, Stat. Appl. Genet. Mol. Biol. 9 (2010) 39. The seed is fixed.

    Args:
        change: float64[documents], finite, summed loss of B minus that of A.
        size: int64[documents], tokens.
        level: of the interval.

    Returns:
        p, and the interval in nats per token; None where so few documents can never be significant.
    """
    rng = np.random.default_rng(SEED)
    signs = rng.integers(0, 2, size=(DRAWS, len(change)), dtype=np.int8) * 2.0 - 1.0
    drawn, tokens = signs @ change, signs @ size.astype(np.float64)
    seen, all_tokens = float(change.sum()), float(size.sum())
    # Roots of (drawn - d tokens)^2 = (seen - d all_tokens)^2; signs that are all alike count against every d.
    with np.errstate(divide="ignore", invalid="ignore"):
        roots = np.stack([(seen - drawn) / (all_tokens - tokens), (seen + drawn) / (all_tokens + tokens)])
    alike = np.abs(tokens) == all_tokens
    low, high = np.where(alike, -math.inf, roots.min(0)), np.where(alike, math.inf, roots.max(0))
    slack = 1e-12 * abs(seen) / all_tokens  # of sums that are equal but for rounding
    hits = int(((low <= slack) & (high >= -slack)).sum())
    needed = math.ceil((1 - level) * (1 + DRAWS) - 1)  # draws that count against a shift that is not rejected
    p = (1 + hits) / (1 + DRAWS)
    limits = float(np.sort(low)[needed - 1]), float(np.sort(high)[-needed])
    if not all(map(math.isfinite, limits)):
        return p, None
    return p, limits
