"""Churn over all epochs of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rayexp.diff.churn import diff_all
from rayexp.diff.churn_page import churn_page
from rayexp.errors import UserError
from rayexp.runs.run import Run


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


def test_what_is_not_finite_differs_from_everything(makes, arrays):
    nan = np.nan
    broken = arrays.images([0, 1], [0, 0], classes=2, loss=[nan, 1.0], confidence=[nan, 0.5])
    whole = arrays.images([0, 1], [0, 0], classes=2)
    r = diff_all(makes.images([whole, broken, broken], 2), [1, 2, 3])
    assert r.matrix.tolist() == [[0, 50, 50], [50, 50, 50], [50, 50, 50]]
    assert [e.changed for e in r.epochs] == [None, 50, 50]
    assert [e.settled for e in r.epochs] == [50, 50, 50]
    assert [e.not_finite for e in r.epochs] == [0, 1, 1]
    assert [(e.forgotten, e.learned) for e in r.epochs] == [(None, None), (0, 0), (0, 0)]
    assert [e.metric for e in r.epochs] == [50, 0, 0]
    assert r.settled_epoch is None
    assert r.answer() == "1 of the 2 images are not finite in the last epoch (3)."


def test_tokens_that_are_not_finite(makes, arrays):
    run = makes.text(
        [arrays.tokens([0, 1, 2], x) for x in ([1, 1, 1], [np.nan, 1, 9], [np.nan, 1, np.inf])], list("abc")
    )
    r = diff_all(run, [1, 2, 3])
    assert r.matrix[0].tolist() == pytest.approx([0, 200 / 3, 200 / 3])
    assert [(e.forgotten, e.learned, e.not_finite) for e in r.epochs] == [(None, None, 0), (1, 0, 1), (0, 0, 2)]
    tree = json.loads(json.dumps(r.to_json(), allow_nan=False))
    assert tree["epochs"][2]["ppl"] is None


def test_of_many_epochs_the_matrix_holds_some_and_says_so(makes, arrays):
    rng = np.random.default_rng(2)
    firsts = rng.integers(0, 3, (9, 40))
    run = makes.images([arrays.images(firsts[0], f, classes=3) for f in firsts], 3)
    whole, bounded = diff_all(run, list(range(1, 10))), diff_all(run, list(range(1, 10)), limit=4)
    assert bounded.epochs == whole.epochs
    assert bounded.sampled == (1, 4, 6, 9)
    assert bounded.matrix.tolist() == whole.matrix[np.ix_([0, 3, 5, 8], [0, 3, 5, 8])].tolist()
    assert whole.left_out == ""
    assert "holds 4 of the 9 epochs" in bounded.left_out
    tree = json.loads(json.dumps(bounded.to_json()))
    assert (tree["matrix_epochs"], tree["epochs_left_out"], len(tree["epochs"])) == ([1, 4, 6, 9], 5, 9)
    page = churn_page(bounded)
    assert page.count("<rect ") == 16
    assert "The matrix holds 4 of the 9 epochs" in page
    assert page.count("<polyline") == 3


def test_an_epoch_is_read_once_and_epochs_jsonl_never(makes, arrays, monkeypatch):
    """Two thousand epochs took minutes: each was read against the whole list of records."""
    run = makes.images([arrays.images([0, 1], [0, 1], classes=2)] * 5, 2)
    read = []
    monkeypatch.setattr(Run, "records", lambda self: pytest.fail("not needed"))
    predictions = Run.predictions
    monkeypatch.setattr(Run, "predictions", lambda self, epoch: (read.append(epoch), predictions(self, epoch))[1])
    diff_all(run, [1, 2, 3, 4, 5])
    assert sorted(read) == [1, 2, 3, 4, 5]


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
