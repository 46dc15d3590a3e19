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

from rayexp.analysis.pair import read_pair
from rayexp.analysis.text_diff import bootstrap, diff_text, documents, sign_flip
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
    r = report_of(makes.text([arrays.tokens([CAT], [1.0])] * 2, VOCABULARY))
    assert dataclasses.replace(r, ratio_interval=interval, max_drop=max_drop).verdict == expected
    assert r.verdict is None


def test_sign_flip_is_the_exact_test_in_the_limit():
    change = np.array([0.5, 1.2, -0.3, 0.8, 0.9, 1.1, 0.2, -0.1])
    sums = [
        abs(sum(s * c for s, c in zip(signs, change, strict=True))) for signs in itertools.product((-1, 1), repeat=8)
    ]
    exact = np.mean([s >= abs(change.sum()) - 1e-9 for s in sums])
    assert sign_flip(change) == pytest.approx(exact, abs=0.01)
    assert sign_flip(-change) == sign_flip(change)
    assert sign_flip(np.zeros(5)) == 1
    assert math.isnan(sign_flip(np.array([1.0, np.nan])))


def test_bootstrap_covers():
    """The interval of the ratio covers the true one in about 95 % of repeated texts."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        size = rng.integers(200, 800, 60)
        effect = rng.normal(0.1, 0.2, 60)
        sums = np.stack([size * 4.0, size * (4.0 + effect)])
        low, high = bootstrap(sums, size)[2]
        hits += low <= math.exp(0.1) <= high
    assert 0.87 <= hits / 100 <= 0.99


def test_infinite_losses_are_reported(makes, arrays):
    token = [CAT, SAT] * 100
    a = arrays.tokens(token, np.ones(200))
    b = arrays.tokens(token, np.full(200, np.nan))
    r = report_of(makes.text([a, b], VOCABULARY)).within(1)
    json.dumps(r.to_json(), allow_nan=False)
    assert r.verdict == "INCONCLUSIVE"


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
