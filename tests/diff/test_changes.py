"""The one rule for what changed, and that everything that shows changes follows it where an output is not finite."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayexp.cli import _diff_tables
from rayexp.diff.changes import FACTOR, KINDS, UNCHANGED, Judgements, churn, default_tolerance, tally, worst_first
from rayexp.diff.churn import diff_all
from rayexp.diff.images import diff_images
from rayexp.diff.images_page import image_page
from rayexp.diff.pair import read_pair
from rayexp.diff.text import diff_text
from rayexp.diff.text_page import text_page
from rayexp.grid.measured import differing
from rayexp.runs.records import Predictions

NAN, INF = math.nan, math.inf


def kinds(first, second, tolerance=FACTOR):
    codes = Judgements.of(first, tolerance).changes(Judgements.of(second, tolerance))
    return [KINDS[c] if c < UNCHANGED else "" for c in codes]


def losses(values, kind="samples"):
    return Predictions(kind, "d", {"index": np.arange(len(values)), "loss": np.asarray(values, np.float32)})


def classes(arrays, label, first, loss=None):
    return Predictions("images", "d", arrays.images(label, first, classes=4, loss=loss))


def test_images_by_hand(arrays):
    label = [0, 0, 0, 0, 0, 0, 0]
    a = classes(arrays, label, [0, 0, 1, 1, 1, 0, 1])
    b = classes(arrays, label, [0, 1, 0, 2, 1, 0, 1], loss=[1, 1, 1, 1, 1, NAN, INF])
    assert kinds(a, b) == ["", "lost", "gained", "other_wrong", "", "not_finite", "not_finite"]
    assert kinds(b, a) == ["", "gained", "lost", "other_wrong", "", "not_finite", "not_finite"]
    assert kinds(b, b)[5:] == ["not_finite", "not_finite"]  # not even equal to itself
    assert tally(Judgements.of(a).changes(Judgements.of(b))) == {
        "not_finite": 2, "lost": 1, "other_wrong": 1, "gained": 1
    }  # fmt: skip
    assert churn(a, b) == differing(a, b) == 5


def test_losses_by_hand():
    a, b = losses([1, 1, 1, 1, NAN, 1, INF]), losses([1.5, 1.6, 0.5, 0.4, 1, -INF, INF])
    assert kinds(a, b, 0.5) == ["", "lost", "", "gained", "not_finite", "not_finite", "not_finite"]
    assert churn(a, b, 0.5) == 5
    order, codes = worst_first(Judgements.of(a, 0.5), Judgements.of(b, 0.5), None)
    assert order.tolist() == [4, 5, 6, 1, 3]
    assert [KINDS[c] for c in codes] == ["not_finite"] * 3 + ["lost", "gained"]
    assert worst_first(Judgements.of(a, 0.5), Judgements.of(b, 0.5), 4)[0].tolist() == [4, 5, 6, 1]  # 1 moved by .6


def test_tolerances(arrays):
    a = classes(arrays, [0], [0])
    assert default_tolerance(a, a) == 0
    assert default_tolerance(losses([1], "tokens"), losses([9], "tokens")) == math.log(2)
    # a tenth of the median of 1, 2, 3, 5, 40 (one of six is not finite), whatever the sign
    assert default_tolerance(losses([1, -2, NAN]), losses([3, 5, 40])) == pytest.approx(0.3)
    assert default_tolerance(losses([NAN]), losses([NAN])) == 0


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 3.0, NAN, INF])] * 2), min_size=1, max_size=30))
def test_every_sample_is_of_one_kind_and_a_swap_mirrors(pairs):
    first, second = (losses(side) for side in zip(*pairs, strict=True))
    forth, back = kinds(first, second, 0.6), kinds(second, first, 0.6)
    mirror = {"lost": "gained", "gained": "lost"}
    assert back == [mirror.get(kind, kind) for kind in forth]
    for (x, y), kind in zip(pairs, forth, strict=True):
        whole = math.isfinite(x) and math.isfinite(y)
        expected = ("lost" if y - x > 0.6 else "gained" if x - y > 0.6 else "") if whole else "not_finite"
        assert kind == expected


@pytest.fixture
def broken_images(makes, arrays):
    """Ten images, right by A: of B two are wrong, one is wrong and not finite, and two that are right are not."""
    label = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    first, second = label.copy(), label.copy()
    first[9] = 0
    second[[0, 1]] = 1
    loss = np.full(10, 0.1)
    loss[[2, 5, 9]] = NAN
    a = arrays.images(label, first, classes=2)
    return makes.images([a, arrays.images(label, second, classes=2, loss=loss, confidence=loss)], 2)


def test_images_in_every_table(broken_images, capsys):
    r = diff_images(*read_pair((broken_images, 1), (broken_images, 2)))
    assert r.table == ((5, 2, 2), (0, 0, 1), (0, 0, 0))
    assert (r.both_right, r.lost, r.gained, r.both_wrong, r.broken, r.not_finite) == (5, 2, 0, 0, 3, (0, 3))
    assert sum(map(sum, r.table)) == r.n
    assert (r.difference, r.mcnemar_p) == (-40, pytest.approx(0.125))  # four right answers are gone: 2 / 2**4
    assert [(c.label, c.n, c.right_a, c.right_b, c.lost, c.gained, c.not_finite) for c in r.classes] == [
        (0, 5, 5, 2, 2, 0, 1), (1, 5, 4, 3, 0, 0, 2)
    ]  # fmt: skip
    assert {(m.label, m.a, m.b, m.count) for m in r.moves} == {
        (0, 0, 1, 2), (0, 0, None, 1), (1, 1, None, 1), (1, 0, None, 1)
    }  # fmt: skip
    assert sum(m.count for m in r.moves) == r.churn == 5
    assert math.isnan(r.confidence["not_finite"][1])
    assert r.confidence["not_finite"][0] == pytest.approx(0.8)
    tree = json.loads(json.dumps(r.to_json(), allow_nan=False))
    assert tree["states"]["right"] == {"right": 5, "wrong": 2, "not_finite": 2}
    assert tree["classes"][1]["not_finite"] == 2
    assert tree["moves"][0] != {"a": {"index": None, "id": None, "words": None}}
    _diff_tables.show_images(r, 20)
    out = capsys.readouterr().out
    assert "B not finite" in out
    assert "A not finite" in out
    row = next(line for line in out.splitlines() if line.strip().startswith("not finite") and "median" in line)
    assert row.split()[2] == "3"
    page = image_page(r)
    assert page.count("✕ 2</b>") == 1
    assert page.count("✕ 1</b>") == 1
    assert page.count("✕ 0</b>") == 3
    assert "A not finite" in page


def test_text_in_every_table(makes, arrays, capsys):
    """A NaN is no loss of probability: counted apart in totals, words, documents, passages and the list."""
    token = np.tile([1, 2, 3, 0], 100)
    a, b = np.ones(400), np.ones(400)
    b[[0, 4, 8, 1]] = NAN
    b[5] = 3.0
    run = makes.text([arrays.tokens(token, a), arrays.tokens(token, b)], ["<eos>", "cat", "sat", "mat"])
    r = diff_text(*read_pair((run, 1), (run, 2)))
    assert (r.lost, r.gained, r.broken, r.churn) == (1, 0, 4, 5)
    assert {w.word: (w.count, w.not_finite) for w in r.words} == {
        "<eos>": (100, 0), "cat": (100, 3), "sat": (100, 1), "mat": (100, 0)
    }  # fmt: skip
    assert r.words[0].word == "sat"
    assert r.words[0].total == pytest.approx(2)
    assert [d.not_finite for d in r.documents] == [4, 0, 0, 0, 0, 0, 0, 0]
    _diff_tables.show_text(r, 20)
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["lost", "1"] in out
    assert ["not", "finite", "4"] in out
    assert ["cat", "100", "3"] in out
    page = text_page(r)
    assert "✕ 4 not finite, from token 1" in page
    assert page.index('<article class="passage broken"') < page.index('<article class="passage worse"')
    rows = list(csv.DictReader(io.StringIO(r.to_csv())))
    assert [row["kind"] for row in rows] == ["not_finite"] * 4 + ["lost"]


def test_a_word_that_is_never_finite_has_no_mean(makes, arrays):
    run = makes.text([arrays.tokens([0, 1], [1, x]) for x in (1, NAN)], ["a", "b"])
    word = diff_text(*read_pair((run, 1), (run, 2))).words[1]
    assert (word.word, word.count, word.not_finite, word.total) == ("b", 1, 1, 0)
    assert math.isnan(word.loss_a)


def test_epochs_that_are_all_broken_differ_from_each_other(makes, arrays):
    run = makes.text([arrays.tokens([0, 1], [NAN, NAN])] * 3, ["a", "b"])
    r = diff_all(run, [1, 2, 3])
    assert all(r.matrix[i, j] == 100 for i, j in itertools.product(range(3), repeat=2))
    assert [e.not_finite for e in r.epochs] == [2, 2, 2]
    assert [(e.forgotten, e.learned) for e in r.epochs[1:]] == [(0, 0), (0, 0)]
