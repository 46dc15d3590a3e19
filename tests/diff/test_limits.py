"""Small facts that nothing else holds: limits, signs, and a formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rayexp.diff import weights
from rayexp.diff.documents import DRAWS, documents, sign_flip
from rayexp.diff.pair import read_pair
from rayexp.diff.text import diff_text
from rayexp.grid.statistics import USL, ScalingFit


def test_a_token_counts_from_a_factor_of_two_on(makes, arrays):
    moves = [math.log(factor) for factor in (2.05, 1.95, 1 / 1.95, 1 / 2.05)]
    before = arrays.tokens([0, 1, 2, 3], [3.0] * 4)
    after = arrays.tokens([0, 1, 2, 3], [3.0 + move for move in moves])
    run = makes.text([before, after], ["a", "b", "c", "d"])
    report = diff_text(*read_pair((run, 1), (run, 2)))
    assert (report.lost, report.gained) == (1, 1)
    assert [(f.word, f.kind) for f in report.flips] == [("a", "lost"), ("d", "gained")]


def test_a_line_that_only_begins_like_a_title_is_none():
    words = ("<eos>", "=", "cat", "sat")
    article = [1, 2, 1, 0, 1, 2, 3, 0, 2, 3, 0]  # " = cat = ", " = cat sat", "cat sat"
    token = np.array(12 * article)
    belongs, count, unit = documents(token, np.arange(len(token)), words)
    assert (count, unit) == (12, "articles")
    assert np.bincount(belongs).tolist() == [len(article)] * 12


def test_the_observed_signs_are_one_of_the_draws():
    """Forty documents that all rose: hardly any draw is as extreme, and p is still not 0 (Phipson and Smyth 2010)."""
    p, interval = sign_flip(np.linspace(1.0, 2.0, 40), np.full(40, 10))
    assert p == pytest.approx(1 / (1 + DRAWS))
    assert interval is not None
    assert interval[0] > 0


def test_the_largest_change_of_a_tensor_has_no_sign():
    change = weights._change("w", np.zeros((2, 2), np.float32), np.array([[0.5, -3.0], [1.0, 0.0]], np.float32))
    assert (change.largest, change.norm) == (3.0, 0.0)
    assert change.moved == pytest.approx(math.sqrt(0.25 + 9 + 1))
    assert change.relative == math.inf


def test_the_peak_of_the_universal_scalability_law():
    """sqrt((1 - sigma) / kappa): Gunther 2007."""
    parameters = {"rate1": (100.0, 99.0, 101.0), "sigma": (0.36, 0.3, 0.4), "kappa": (0.01, 0.005, 0.02)}
    assert ScalingFit("USL", USL, parameters, None, (8, 8)).peak == pytest.approx(8.0)
    n = np.arange(1, 30)
    assert n[np.argmax(ScalingFit("USL", USL, parameters, None, (8, 8)).rate(n))] == 8
