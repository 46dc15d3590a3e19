"""Churn over all epochs of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rayexp.analysis.churn import diff_all
from rayexp.errors import UserError


def test_by_hand(makes, arrays):
    label = [0, 1, 2, 0]
    firsts = [[1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 2, 1], [0, 1, 2, 1]]
    run = makes.images([arrays.images(label, f, classes=3) for f in firsts], 3)
    r = diff_all(run, [1, 2, 3, 4])
    assert r.matrix.tolist() == [[0, 50, 75, 75], [50, 0, 25, 25], [75, 25, 0, 0], [75, 25, 0, 0]]
    assert [e.changed for e in r.epochs] == [None, 50, 25, 0]
    assert [e.to_last for e in r.epochs] == [75, 25, 0, 0]
    assert [e.settled for e in r.epochs] == [25, 75, 100, 100]
    assert [e.forgotten for e in r.epochs] == [None, 1, 0, 0]
    assert [e.learned for e in r.epochs] == [None, 1, 1, 0]
    assert [e.metric for e in r.epochs] == [50, 50, 75, 75]
    assert r.settled_epoch == 3
    assert "from epoch 3 on" in r.answer()
    assert json.loads(json.dumps(r.to_json()))["churn_matrix"][0][2] == 75


def test_a_break_unsettles(makes, arrays):
    firsts = [[0, 0], [1, 0], [0, 0]]
    run = makes.images([arrays.images([0, 0], f, classes=2) for f in firsts], 2)
    assert [e.settled for e in diff_all(run, [1, 2, 3]).epochs] == [50, 50, 100]


def test_text(makes, arrays):
    losses = [[1.0, 1.0, 1.0], [1.0, 2.0, 0.2], [1.0, 2.0, 0.1]]
    run = makes.text([arrays.tokens([0, 1, 2], x) for x in losses], ["a", "b", "c"])
    r = diff_all(run, [1, 2, 3])
    assert r.matrix[0, 1] == pytest.approx(200 / 3)
    assert (r.epochs[1].forgotten, r.epochs[1].learned) == (1, 1)
    assert r.epochs[1].settled == 100
    assert r.epochs[0].metric == pytest.approx(np.e)


def test_one_epoch_and_none(makes, arrays):
    run = makes.images([arrays.images([0, 1], [0, 1], classes=2)], 2)
    assert "one epoch" in diff_all(run, [1]).answer()
    with pytest.raises(UserError, match="no epoch"):
        diff_all(run, [])


def test_other_data_in_between(makes, arrays):
    run = makes.images([arrays.images([0, 1], [0, 1], classes=2)] * 2, 2)
    other = makes.images([arrays.images([0, 1], [0, 1], classes=2)] * 2, 2, data_sha="e" * 64)
    run.predictions_path(2).write_bytes(other.predictions_path(2).read_bytes())
    with pytest.raises(UserError, match="different validation data"):
        diff_all(run, [1, 2])
