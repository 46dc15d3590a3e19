"""Language models: documents, intervals, the paired test, words."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats

from rayexp.diff.documents import bootstrap, documents, sign_flip
from rayexp.diff.pair import read_pair
from rayexp.diff.text import diff_text
from rayexp.errors import UserError

VOCABULARY = ["<eos>", "=", "cat", "dog", "sat", "ran", "[bold]"]
EOS, IS, CAT, DOG, SAT, RAN, BOLD = range(7)


def report_of(run, other=None, epochs=(1, 2)):
    return diff_text(*read_pair((run, epochs[0]), (other or run, epochs[1])))


def article(title, lines):
    return [EOS, IS, title, IS, EOS, *itertools.chain(*([*line, EOS] for line in lines))]


def test_by_hand(makes, arrays):
    token = [CAT, SAT, DOG, SAT]
    a = arrays.tokens(token, [1, 2, 3, 4])
    b = arrays.tokens(token, [2, 2, 1, 3.9])
    r = report_of(makes.text([a, b], VOCABULARY))
    assert r.n == 4
    assert r.ppl == pytest.approx((math.exp(2.5), math.exp(8.9 / 4)))
    assert r.ratio == pytest.approx(math.exp(-1.1 / 4))
    assert (r.lost, r.gained, r.churn) == (1, 1, 2)
    assert r.to_json()["churn_rate"] == 2 / r.n
    assert [(w.word, w.count, round(w.total, 3)) for w in r.words] == [("cat", 1, 1), ("sat", 2, -0.1), ("dog", 1, -2)]
    assert [(f.offset, f.word, f.kind) for f in r.flips] == [(1, "cat", "lost"), (3, "dog", "gained")]
    assert r.ratio_interval is None
    assert r.paired_p is None
    assert r.within(5).verdict == "INCONCLUSIVE"


def test_articles_are_found():
    text = []
    for i in range(12):
        text += article(CAT if i % 2 else DOG, [[IS, IS, SAT, IS, IS], [CAT, SAT], [IS, CAT]])
    token = np.array(text[1:])  # as training leaves it: nothing is predicted for the first token
    belongs, count, unit = documents(token, np.arange(1, len(text)), tuple(VOCABULARY))
    assert (count, unit) == (12, "articles")
    sizes = np.bincount(belongs)
    assert len(set(sizes.tolist())) <= 2
    assert np.all(np.diff(belongs) >= 0)
    starts = np.flatnonzero(np.diff(belongs)) + 1
    assert (token[starts] == IS).all()
    assert set(token[starts + 1].tolist()) <= {CAT, DOG}


def test_text_without_articles_is_cut_into_blocks():
    token = np.tile([CAT, SAT, EOS], 1000)
    belongs, count, unit = documents(token, np.arange(3000), tuple(VOCABULARY))
    assert (count, unit) == (60, "blocks")
    assert set(np.bincount(belongs).tolist()) == {50}
    assert documents(token[:20], np.arange(20), ("a", "b", "c", "d", "e"))[1:] == (1, "blocks")
    assert documents(np.tile(token, 5), np.arange(15000), tuple(VOCABULARY))[1:] == (200, "blocks")


def test_a_line_that_begins_with_two_signs_is_no_title():
    text = []
    for _ in range(12):
        text += article(CAT, [[IS, IS, SAT, CAT, IS], [CAT, SAT]])
    count = documents(np.array(text), np.arange(len(text)), tuple(VOCABULARY))[1]
    assert count == 12


def test_report_of_articles(makes, arrays):
    rng = np.random.default_rng(0)
    text = list(itertools.chain(*(article(CAT, [rng.integers(2, 7, 50).tolist()]) for _ in range(20))))
    loss = rng.gamma(2, 1, len(text))
    a, b = arrays.tokens(text, loss), arrays.tokens(text, loss - 0.05 + rng.normal(0, 0.1, len(text)))
    r = report_of(makes.text([a, b], VOCABULARY)).within(1)
    assert r.unit == "articles"
    assert [d.title for d in r.documents] == ["cat"] * 20
    assert sum(d.count for d in r.documents) == r.n
    assert r.ppl_interval[0][0] < r.ppl[0] < r.ppl_interval[0][1]
    assert r.ratio_interval[0] < r.ratio < r.ratio_interval[1] < 1
    assert r.paired_p < 0.01
    assert r.verdict == "PASS"
    mirrored = report_of(makes.text([b, a], VOCABULARY)).within(1)
    assert mirrored.verdict == "FAIL"
    assert (mirrored.gained, mirrored.lost) == (r.lost, r.gained)
    assert mirrored.ratio_interval == pytest.approx((1 / r.ratio_interval[1], 1 / r.ratio_interval[0]))
    assert mirrored.paired_p == r.paired_p
    tree = json.loads(json.dumps(r.to_json(), allow_nan=False))
    assert {"n", "ppl", "churn", "gained", "lost", "paired_p", "flips"} <= tree.keys()
    rows = list(csv.DictReader(io.StringIO(r.to_csv())))
    assert len(rows) == r.churn
    assert report_of(makes.text([a, b], VOCABULARY)).to_json()["ratio_interval"] == tree["ratio_interval"]


@pytest.mark.parametrize(
    ("interval", "max_drop", "expected"),
    [
        ((0.9, 1.005), 1, "PASS"),
        ((1.02, 1.05), 1, "FAIL"),
        ((0.99, 1.02), 1, "INCONCLUSIVE"),
        ((0.9, 0.99), 0, "PASS"),
        ((0.99, 1.01), 0, "INCONCLUSIVE"),
        (None, 1, "INCONCLUSIVE"),
    ],
)
def test_verdict(makes, arrays, interval, max_drop, expected):
    r = report_of(makes.text([arrays.tokens([CAT], [1.0]), arrays.tokens([CAT], [1.1])], VOCABULARY))
    assert dataclasses.replace(r, ratio_interval=interval, max_drop=max_drop).verdict == expected
    assert r.verdict is None


def test_sign_flip_is_the_exact_test_in_the_limit():
    change = np.array([0.5, 1.2, -0.3, 0.8, 0.9, 1.1, 0.2, -0.1])
    sums = [
        abs(sum(s * c for s, c in zip(signs, change, strict=True))) for signs in itertools.product((-1, 1), repeat=8)
    ]
    exact = np.mean([s >= abs(change.sum()) - 1e-9 for s in sums])
    size = np.full(8, 10)
    assert sign_flip(change, size)[0] == pytest.approx(exact, abs=0.01)
    assert sign_flip(-change, size)[0] == sign_flip(change, size)[0]
    assert sign_flip(np.zeros(5), size[:5])[0] == 1
    assert sign_flip(np.ones(40), np.full(40, 9))[0] == 1 / 5001  # the observed signs are a draw: p is never 0


def test_interval_of_the_change_is_the_inverted_test():
    """A shift inside it is not rejected by the test of what remains, one outside is; the test is written anew here."""
    rng = np.random.default_rng(3)
    size = rng.integers(20, 400, 12)
    change = size * rng.normal(0.05, 0.1, 12)
    signs = rng.choice([-1.0, 1.0], (40_000, 12))

    def p(shift):
        left = change - shift * size
        return np.mean(np.abs(signs @ left) >= abs(left.sum()) * (1 - 1e-12))

    low, high = sign_flip(change, size)[1]
    assert low < change.sum() / size.sum() < high
    for limit, outward in ((low, -1), (high, 1)):
        assert p(limit + outward * 0.01) < 0.05 < p(limit - outward * 0.01)


def test_interval_and_test_of_the_change_agree():
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(300):
        count = int(rng.integers(6, 40))
        size = rng.integers(20, 400, count)
        change = size * rng.normal(rng.choice([0.0, 0.05, 0.1]), 0.2, count)
        p, (low, high) = sign_flip(change, size)
        assert (low <= 0 <= high) == (p >= 0.05)
        seen.add(p < 0.05)
    assert seen == {True, False}


def test_few_documents_have_no_interval():
    # of five documents the most extreme of all signs comes up in 2 of 32 draws
    assert sign_flip(np.arange(1.0, 6.0), np.full(5, 9))[1] is None
    assert sign_flip(np.arange(1.0, 8.0), np.full(7, 9))[1] is not None


ROUNDS = 400


def texts(rng, count, skewed):
    """Summed losses of A and B, and tokens, of so many documents; a document's mean loss is 4.0 and 4.1 on average."""
    size = rng.integers(200, 800, count)
    effect = rng.normal(0.1, 0.2, count)
    level = 4.0 + 0.3 * ((rng.gamma(4, size=count) - 4) / 2 if skewed else rng.standard_normal(count))
    return np.stack([size * level, size * (level + effect)]), size


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("count", [10, *(pytest.param(n, marks=pytest.mark.slow) for n in (25, 100))])
def test_intervals_cover(count, skewed):
    """They hold the true value in 92 to 98 of 100 repeated texts."""
    rng = np.random.default_rng(1)
    change, perplexity = 0, 0
    for _ in range(ROUNDS):
        sums, size = texts(rng, count, skewed)
        low, high = sign_flip(sums[1] - sums[0], size)[1]
        change += low <= 0.1 <= high
        low, high = bootstrap(sums, size)[0]
        perplexity += low <= math.exp(4.0) <= high
    assert 0.92 <= change / ROUNDS <= 0.98
    assert 0.92 <= perplexity / ROUNDS <= 0.98


def test_plain_percentiles_of_few_documents_would_not_cover():
    rng, held = np.random.default_rng(1), 0
    for _ in range(ROUNDS):
        sums, size = texts(rng, 10, False)
        drawn = rng.multinomial(10, np.full(10, 0.1), size=1000)
        low, high = np.quantile(drawn @ sums[0] / (drawn @ size), [0.025, 0.975])
        held += low <= 4.0 <= high
    assert held / ROUNDS < 0.92


def test_fewer_than_ten_documents_have_no_interval_of_the_perplexity(makes, arrays):
    rng = np.random.default_rng(0)
    for n, expected in ((499, False), (500, True)):
        token, loss = rng.integers(0, 4, n), rng.gamma(2, 1, n)
        r = report_of(makes.text([arrays.tokens(token, loss), arrays.tokens(token, loss + 0.1)], VOCABULARY))
        assert len(r.documents) == n // 50
        assert (r.ppl_interval is not None) == expected


def test_bootstrap_by_loops():
    """Its quantiles are those of texts put together document by document."""
    rng = np.random.default_rng(9)
    size = rng.integers(50, 300, 15)
    sums = np.stack([size * rng.normal(4, 0.5, 15), size * rng.normal(3, 0.5, 15)])
    draws = []
    for _ in range(20_000):
        picked = rng.integers(0, 15, 15)
        draws.append(sums[:, picked].sum(1) / size[picked].sum())
    tail = scipy.stats.norm.sf(math.sqrt(15 / 14) * scipy.stats.t.ppf(0.975, 14))
    expected = np.exp(np.quantile(draws, [tail, 1 - tail], axis=0))
    assert bootstrap(sums, size)[0] == pytest.approx(tuple(expected[:, 0]), rel=0.02)
    assert bootstrap(sums, size)[1] == pytest.approx(tuple(expected[:, 1]), rel=0.02)


def test_what_is_not_finite_has_a_row_of_its_own(makes, arrays):
    token = [CAT, SAT, DOG, RAN] * 100
    loss = np.ones(400)
    a, b = loss.copy(), loss.copy()
    a[:2] = np.inf, np.nan
    b[1:4] = np.nan, np.nan, -np.inf
    b[4], b[5] = 3.0, 0.1
    r = report_of(makes.text([arrays.tokens(token, a), arrays.tokens(token, b)], VOCABULARY)).within(50)
    assert (r.not_finite, r.broken) == ((2, 3), 4)
    assert (r.lost, r.gained, r.churn) == (1, 1, 6)
    assert [(f.offset, f.kind) for f in r.flips] == [
        (1, "not_finite"), (2, "not_finite"), (3, "not_finite"), (4, "not_finite"), (5, "lost"), (6, "gained")
    ]  # fmt: skip
    assert r.ratio_interval is None
    assert r.paired_p is None
    assert (r.verdict, r.equal) == ("FAIL", False)
    assert "3 of the 400 judgements of B are not finite" in r.ruling.why
    assert [w.word for w in r.words if w.total] == ["cat", "sat"]  # of the finite ones
    assert all(math.isfinite(w.total) for w in r.words)
    tree = json.loads(json.dumps(r.to_json(), allow_nan=False))
    assert tree["not_finite"] == {"a": 2, "b": 3, "either": 4}
    assert tree["ppl"]["b"] is None
    assert tree["flips"][0]["loss_a"] is None
    rows = list(csv.DictReader(io.StringIO(r.to_csv())))
    assert [row["kind"] for row in rows] == ["not_finite"] * 4 + ["lost", "gained"]
    mirrored = report_of(makes.text([arrays.tokens(token, loss), arrays.tokens(token, loss)], VOCABULARY)).within(0)
    assert (mirrored.verdict, mirrored.equal) == ("PASS", True)


def test_a_base_that_is_not_finite_proves_nothing(makes, arrays):
    token = [CAT, SAT] * 100
    broken, whole = arrays.tokens(token, np.full(200, np.nan)), arrays.tokens(token, np.ones(200))
    assert report_of(makes.text([broken, whole], VOCABULARY)).within(9).verdict == "INCONCLUSIVE"
    both = report_of(makes.text([broken, broken], VOCABULARY, weights=[{"w": np.ones(2, np.float32)}] * 2)).within(9)
    assert both.same_model
    assert (both.verdict, both.equal, both.broken) == ("FAIL", False, 200)
    assert both.to_csv().count("not_finite") == 200


def test_refused_vocabulary(makes, arrays):
    a = arrays.tokens([CAT, SAT], [1, 2])
    first, second = makes.text([a], VOCABULARY), makes.text([a], [*VOCABULARY[:3], "cow", *VOCABULARY[4:]])
    with pytest.raises(UserError, match="first difference at word 3"):
        report_of(first, second, epochs=(1, 1))
    with pytest.raises(UserError, match="names word 3"):
        report_of(makes.text([arrays.tokens([DOG], [1])] * 2, VOCABULARY[:3]))


def test_refused_other_tokens(makes, arrays):
    first = makes.text([arrays.tokens([CAT, SAT], [1, 2])], VOCABULARY)
    second = makes.text([arrays.tokens([CAT, RAN], [1, 2])], VOCABULARY)
    with pytest.raises(UserError, match="different tokens"):
        report_of(first, second, epochs=(1, 1))
