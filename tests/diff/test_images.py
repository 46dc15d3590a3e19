"""The comparison of images: a hand-worked example, an independent recomputation, symmetry, and refusals."""

from __future__ import annotations

import collections
import csv
import dataclasses
import hashlib
import io
import json
import shutil

import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rayexp.diff.images import KINDS, diff_images
from rayexp.diff.pair import Checkpoint, config_changes, read_pair
from rayexp.diff.statistics import detectable_difference, difference_interval
from rayexp.errors import UserError
from rayexp.runs.records import Predictions


def report_of(run_a, run_b=None, epochs=(1, 2)):
    return diff_images(*read_pair((run_a, epochs[0]), (run_b or run_a, epochs[1])))


def test_by_hand(makes, arrays):
    #          right  right lost  lost  gained other wrong (same) gained right
    label = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    first = [0, 1, 2, 3, 5, 0, 1, 2, 0, 3]
    second = [0, 1, 3, 0, 4, 1, 1, 1, 2, 3]
    loss_b = [0.1, 0.1, 2.0, 5.0, 0.3, 3.0, 2.0, 0.2, 0.1, 0.1]
    a = arrays.images(label, first, classes=6)
    b = arrays.images(label, second, classes=6, loss=loss_b, confidence=np.linspace(0.5, 0.95, 10))
    r = report_of(makes.images([a, b], 6))
    assert (r.n, r.both_right, r.lost, r.gained, r.both_wrong, r.other_wrong, r.churn) == (10, 3, 2, 3, 2, 1, 6)
    assert r.acc1 == pytest.approx((50, 60))
    assert r.difference == pytest.approx(10)
    assert r.mcnemar_p == pytest.approx(1)  # 2 of 5: p = min(1, 2 * 16/32)
    assert [(f.name, f.kind) for f in r.flips] == [
        ("val_3.JPEG", "lost"),  # its loss rose most
        ("val_2.JPEG", "lost"),
        ("val_5.JPEG", "other_wrong"),
        ("val_4.JPEG", "gained"),
        ("val_7.JPEG", "gained"),
        ("val_8.JPEG", "gained"),
    ]
    worst = r.flips[0]
    assert (worst.label, worst.a, worst.b) == (3, 3, 0)
    assert worst.confidence_a == pytest.approx(0.8)
    assert worst.confidence_b == pytest.approx(0.65)
    # the top five of the fixture are the first and the four classes after it: all but (first - 1) % 6, which is the
    # label of images 4, 5, 6, 7 for A and of images 2 and 6 for B
    assert r.acc5 == pytest.approx((60, 80))
    assert [r.count(kind) for kind in KINDS] == [0, r.lost, r.other_wrong, r.gained]
    assert r.confidence["lost"] == pytest.approx((0.8, (0.6 + 0.65) / 2))
    assert {(c.label, c.gained, c.lost) for c in r.classes} == {
        (0, 0, 0), (1, 1, 0), (2, 1, 1), (3, 0, 1), (4, 1, 0), (5, 0, 0)
    }  # fmt: skip
    assert r.words(3) == "thing 3"


def recompute(a, b, classes):
    """The same figures by plain loops."""
    n = len(a["label"])
    table = collections.Counter()
    moves = collections.Counter()
    per_class = {}
    for i in range(n):
        y, p, q = int(a["label"][i]), int(a["top5"][i][0]), int(b["top5"][i][0])
        table[p == y, q == y] += 1
        table["churn"] += p != q
        table["other"] += p != q and p != y and q != y
        table["acc5a"] += y in a["top5"][i].tolist()
        table["acc5b"] += y in b["top5"][i].tolist()
        if p != q:
            moves[y, p, q] += 1
        gained, lost, count = per_class.get(y, (0, 0, 0))
        per_class[y] = (gained + (p != y and q == y), lost + (p == y and q != y), count + 1)
    return table, moves, per_class


def test_against_independent_code(makes):
    run = makes.random_images(1500, 12, 3, seed=4)
    a, b = run.predictions(1), run.predictions(3)
    table, moves, per_class = recompute(a, b, 12)
    r = report_of(run, epochs=(1, 3))
    assert (r.both_right, r.lost, r.gained, r.both_wrong) == (
        table[True, True], table[True, False], table[False, True], table[False, False]
    )  # fmt: skip
    assert (r.churn, r.other_wrong) == (table["churn"], table["other"])
    assert r.acc5 == pytest.approx((table["acc5a"] / 15, table["acc5b"] / 15))
    assert r.mcnemar_p == pytest.approx(scipy.stats.binomtest(r.gained, r.gained + r.lost).pvalue, rel=1e-9)
    low, high = difference_interval(table[False, True], table[True, False], 1500)
    assert r.interval == pytest.approx((100 * low, 100 * high))
    assert r.detectable == pytest.approx(100 * detectable_difference(r.gained + r.lost, 1500))
    assert {(m.label, m.a, m.b): m.count for m in r.moves} == dict(moves)
    assert [m.count for m in r.moves] == sorted(moves.values(), reverse=True)
    assert {c.label: (c.gained, c.lost, c.n) for c in r.classes} == per_class
    rise = [per_class[c.label][0] - per_class[c.label][1] for c in r.classes]
    assert rise == sorted(rise)  # losses first
    assert len(set(rise)) > 1
    p = {y: scipy.stats.binomtest(g, g + k).pvalue if g + k else 1.0 for y, (g, k, _) in per_class.items()}
    adjusted = dict(zip(p, scipy.stats.false_discovery_control(list(p.values())), strict=True))
    assert {c.label: c.adjusted_p for c in r.classes} == pytest.approx(adjusted)
    order = [(KINDS.index(f.kind), -(f.loss_b - f.loss_a)) for f in r.flips]
    assert order == sorted(order)


@pytest.fixture
def seven_classes(makes, arrays):
    """A run with 7 classes and 40 images."""
    zeros = np.zeros(40, np.int64)
    return makes.images([arrays.images(zeros, zeros, classes=7)], 7)


judgements = st.integers(1, 40).flatmap(lambda n: hnp.arrays(np.int64, (3, n), elements=st.integers(0, 6)))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(judgements, st.integers(0, 9))
def test_swap_mirrors(seven_classes, arrays, drawn, seed):
    label, first, second = drawn
    rng = np.random.default_rng(seed)
    made = [arrays.images(label, x, classes=7, loss=rng.random(len(label))) for x in (first, second)]
    a, b = (Checkpoint(seven_classes, e, Predictions("images", "d", x), "") for e, x in enumerate(made, 1))
    r, mirrored = diff_images(a, b), diff_images(b, a)
    n = len(label)
    assert r.gained - r.lost == pytest.approx(n * (r.acc1[1] - r.acc1[0]) / 100)
    assert r.both_right + r.both_wrong + r.gained + r.lost == n
    assert r.churn == len(r.flips) == int((first != second).sum())
    assert (r.gained, r.lost, r.other_wrong) == (mirrored.lost, mirrored.gained, mirrored.other_wrong)
    assert r.mcnemar_p == mirrored.mcnemar_p
    assert r.interval == pytest.approx((-mirrored.interval[1], -mirrored.interval[0]), abs=1e-6)
    assert {(m.label, m.a, m.b, m.count) for m in r.moves} == {(m.label, m.b, m.a, m.count) for m in mirrored.moves}
    turned = {"lost": "gained", "gained": "lost", "other_wrong": "other_wrong"}
    assert {(f.index, f.kind, f.a, f.b) for f in r.flips} == {
        (f.index, turned[f.kind], f.b, f.a) for f in mirrored.flips
    }


def test_json_and_csv(makes):
    run = makes.random_images(200, 4, 2, names=[f'odd "{i}", näme.JPEG' for i in range(200)])
    r = report_of(run).within(2.0)
    tree = json.loads(json.dumps(r.to_json(), allow_nan=False))
    assert tree["churn_rate"] == pytest.approx(r.churn / r.n)
    for key in ("n", "acc1", "acc5", "churn", "gained", "lost", "mcnemar_p", "flips"):
        assert key in tree
    assert tree["acc1"] == {"a": r.acc1[0], "b": r.acc1[1]}
    assert tree["churn"] == len(tree["flips"]) == tree["gained"] + tree["lost"] + tree["other_wrong"]
    flip = tree["flips"][0]
    assert flip["name"] == r.flips[0].name
    assert flip["a"]["words"] == f"thing {r.flips[0].a}, genus {r.flips[0].a}"
    rows = list(csv.DictReader(io.StringIO(r.to_csv())))
    assert [row["name"] for row in rows] == [f.name for f in r.flips]
    assert float(rows[0]["b_confidence"]) == pytest.approx(r.flips[0].confidence_b, abs=1e-6)


@pytest.mark.parametrize("first", [-1, 0], ids=["as stored now", "as older runs stored it"])
def test_what_is_not_finite_is_never_right_and_equal_to_nothing(makes, arrays, first):
    """A sort puts NaN first, so class 0 seemed the likeliest; here it is the true class of most images."""
    nan = np.nan
    label = [0, 0, 0, 0, 1, 1, 0, 0]
    broken = [False, False, True, True, True, False, False, False]
    a = arrays.images(label, [0, 0, 0, 1, 1, 1, 1, 0], classes=2)
    top5 = np.where(np.array(broken)[:, None], first, [[0, 1], [1, 0], [0, 1], [0, 1], [0, 1], [1, 0], [0, 1], [0, 1]])
    numbers = np.where(broken, nan, 0.5)
    b = arrays.images(label, top5[:, 0], classes=2, rest=top5, loss=numbers, confidence=numbers)
    r = report_of(makes.images([a, b], 2)).within(100)
    assert r.acc1 == (75, 50)
    assert r.acc5 == (100, 62.5)
    assert (r.both_right, r.lost, r.gained, r.both_wrong, r.broken) == (3, 1, 1, 0, 3)
    assert (r.not_finite, r.churn, r.other_wrong) == ((0, 3), 5, 0)
    assert r.difference == -25  # right in A but not in B: images 1, 2 and 4; the reverse: 6
    assert r.mcnemar_p == pytest.approx(scipy.stats.binomtest(1, 4).pvalue)
    assert [(f.index, f.kind, f.a, f.b) for f in r.flips] == [
        (2, "not_finite", 0, None), (4, "not_finite", 1, None), (3, "not_finite", 1, None), (1, "lost", 0, 1),
        (6, "gained", 1, 0),
    ]  # fmt: skip
    assert sum(m.count for m in r.moves) == 5
    assert {(m.a, m.b) for m in r.moves if m.b is None} == {(0, None), (1, None)}
    assert (r.verdict, r.equal) == ("FAIL", False)
    assert "3 of the 8 judgements of B are not finite" in r.ruling.why
    tree = json.loads(json.dumps(r.to_json(), allow_nan=False))
    assert tree["not_finite"] == {"a": 0, "b": 3, "either": 3}
    assert tree["loss"]["b"] is None
    assert tree["flips"][0]["b"] == {"index": None, "id": None, "words": None, "confidence": None, "loss": None}
    row = next(csv.DictReader(io.StringIO(r.to_csv())))
    assert (row["kind"], row["b"], row["b_words"]) == ("not_finite", "", "")


def test_two_broken_models_are_not_equal(makes, arrays):
    nan = [np.nan] * 3
    broken = arrays.images([0, 0, 1], [0, 0, 0], classes=2, loss=nan, confidence=nan)
    whole = arrays.images([0, 0, 1], [1, 1, 0], classes=2)
    same = report_of(makes.images([broken, broken], 2, weights=[{"w": np.ones(3, np.float32)}] * 2)).within(100)
    assert same.same_model
    assert (same.equal, same.churn, same.verdict) == (False, 3, "FAIL")
    assert report_of(makes.images([broken, whole], 2)).within(100).verdict == "INCONCLUSIVE"
    partly = arrays.images([0, 0, 1], [0, 0, 1], classes=2, loss=[np.nan, 1, 1], confidence=[np.nan, 1, 1])
    same = report_of(makes.images([partly, partly], 2)).within(100)
    assert (same.equal, same.churn, same.verdict) == (False, 1, "FAIL")


def test_equal_judgements_pass(makes, arrays):
    """With so few images no interval lies within half a point; what says the same needs none."""
    label = [0, 1, 2, 0]
    a = arrays.images(label, [0, 1, 0, 1], classes=3)
    rounded = arrays.images(label, [0, 1, 0, 1], classes=3, loss=[0.2000001, 0.2, 2.0, 2.0])
    other = arrays.images(label, [0, 1, 1, 1], classes=3)
    ones = [{"w": np.ones(3, np.float32)}] * 2
    for arrays_of, weights, expected in [
        ([a, a], None, "PASS"),
        ([a, rounded], ones, "PASS"),  # the same weights on another device
        ([a, rounded], None, "INCONCLUSIVE"),
        ([a, other], ones, "INCONCLUSIVE"),
    ]:
        r = report_of(makes.images(arrays_of, 3, weights=weights)).within(0.5)
        assert r.verdict == expected
        assert r.equal == (expected == "PASS")
        assert r.interval[0] < -0.5


def test_the_gate_and_the_printed_p_are_one_test(makes, arrays):
    """Gained 5, lost 0 of 100: p is 0.0625, which is no proof that B is not worse."""
    label = np.zeros(100, int)
    for gained, verdict in ((5, "INCONCLUSIVE"), (6, "PASS")):
        first = np.where(np.arange(100) < gained, 1, 0)
        r = report_of(makes.images([arrays.images(label, x, classes=2) for x in (first, label)], 2)).within(0)
        assert (r.gained, r.lost) == (gained, 0)
        assert r.verdict == verdict
        assert (r.mcnemar_p < 0.05) == (verdict == "PASS") == (r.interval[0] > 0)


def test_top5_with_fewer_columns_ties_and_the_label_last(makes, arrays):
    rest = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]]
    a = arrays.images([4, 0, 0, 0], [0, 4, 5, 1], classes=6, rest=rest)
    assert report_of(makes.images([a, a], 6)).acc5 == (50, 50)


def test_cells_are_no_formulas_and_no_escapes(makes, arrays):
    """Class words, ids and image names that a spreadsheet would run, and a Latin-1 name as the file system gives it."""
    names = ["=1+2.png", "caf\udce9.png", "+x", "\x1b[2Jb.png"]
    run = makes.images(
        [arrays.images([0, 1, 0, 1], x, classes=2) for x in ([0, 0, 1, 1], [1, 1, 0, 0])], 2,
        names=names, words=["=cmd|' /C calc'!A0", "@evil, -2"],
    )  # fmt: skip
    text = report_of(run).to_csv()
    text.encode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["name"] for row in rows} == {"'=1+2.png", "caf\\xe9.png", "'+x", "\\x1b[2Jb.png"}
    assert {row["label_words"] for row in rows} == {"'=cmd|' /C calc'!A0", "'@evil, -2"}
    assert {row["a_words"] for row in rows} == {"'=cmd|' /C calc'!A0", "'@evil, -2"}
    assert {f["name"] for f in report_of(run).to_json()["flips"]} == set(names)


def test_fewer_than_five_classes(makes, arrays):
    a = arrays.images([0, 1], [1, 0], classes=2)
    r = report_of(makes.images([a, a], 2))
    assert r.acc5 == (100, 100)
    assert r.churn == 0
    assert r.flips == ()


def test_same_model(makes, arrays):
    a = arrays.images([0, 1], [1, 0], classes=2)
    weights = [{"w": np.ones(3, np.float32)}] * 2
    assert report_of(makes.images([a, a], 2, weights=weights)).same_model
    assert not report_of(makes.images([a, a], 2)).same_model


def test_two_runs_and_their_configurations(makes, arrays):
    a = arrays.images([0, 1, 1], [1, 0, 1], classes=2)
    b = arrays.images([0, 1, 1], [0, 1, 1], classes=2)
    first = makes.images([a], 2, name="one", config={"scaling": {"num_workers": 1}, "reduction": "ddp"})
    second = makes.images([b], 2, name="two", config={"scaling": {"num_workers": 2}, "reduction": "ddp"})
    r = report_of(first, second, epochs=(1, 1))
    assert (r.gained, r.lost) == (2, 0)
    assert config_changes(r.a, r.b) == [("scaling.num_workers", 1, 2)]


def test_refused_other_data(makes, arrays):
    a = arrays.images([0, 1], [1, 0], classes=2)
    first = makes.images([a], 2, data_sha="1" * 64)
    second = makes.images([a], 2, data_sha="2" * 64)
    with pytest.raises(UserError, match=r"different validation data .*1111.*2222"):
        report_of(first, second, epochs=(1, 1))


def test_refused_other_kind(makes, arrays):
    images = makes.images([arrays.images([0, 1], [1, 0], classes=2)], 2)
    text = makes.text([arrays.tokens([0, 1], [1.0, 1.0])], ["a", "b"], data_sha="d" * 64)
    with pytest.raises(UserError, match="nothing to compare"):
        read_pair((images, 1), (text, 1))


def test_refused_other_classes(makes, arrays):
    a = arrays.images([0, 1], [1, 0], classes=2)
    first, second = makes.images([a], 2), makes.images([a], 2)
    data = json.loads(second.data_path.read_text())
    data["classes"] = data["classes"][::-1]
    second.write("data.json", json.dumps(data))
    with pytest.raises(UserError, match="same classes"):
        report_of(first, second, epochs=(1, 1))


def damaged(checkpoint, **changes):
    p = checkpoint.predictions
    return dataclasses.replace(checkpoint, predictions=Predictions(p.kind, p.data_sha, {**p.arrays, **changes}))


def test_refused_damage(makes, arrays):
    run = makes.images([arrays.images([0, 1, 1], [1, 0, 1], classes=2)] * 2, 2)
    a, b = read_pair((run, 1), (run, 2))
    for changes, words in [
        ({"label": np.array([0, 0, 1])}, "true labels"),
        ({"index": np.array([0, 2, 3])}, "different parts"),
        ({"index": np.array([0, 2, 1])}, "rise strictly"),
        ({"loss": np.zeros(2, np.float32)}, "unequal length"),
        ({"top5": np.zeros(3, np.int32)}, "top5"),
        ({"top5": np.full((3, 2), 7, np.int32)}, "class 7"),
    ]:
        with pytest.raises(UserError, match=words):
            diff_images(a, damaged(b, **changes))
    without = Predictions(
        "images", b.predictions.data_sha, {k: v for k, v in b.predictions.arrays.items() if k != "top5"}
    )
    with pytest.raises(UserError, match="'top5' is missing"):
        diff_images(a, Checkpoint(run, 2, without, ""))
    beyond = np.array([0, 1, 3])
    with pytest.raises(UserError, match="lists 3 validation images"):
        diff_images(damaged(a, index=beyond), damaged(b, index=beyond))
    run.data_path.write_text(json.dumps({"kind": "images"}))
    with pytest.raises(UserError, match=r"data\.json"):
        diff_images(a, b)


def test_refused_missing_or_broken_files(makes, arrays):
    run = makes.images([arrays.images([0, 1], [1, 0], classes=2)] * 2, 2)
    path = run.predictions_path(2)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not a predictions file"):
        report_of(run)
    path.unlink()
    with pytest.raises(UserError, match=r"epoch_002\.npz"):
        report_of(run)
    shutil.rmtree(run.root)


def test_predictions_of_another_epoch_are_not_compared(makes):
    """They would pass a gate; the record of the epoch has their hash."""
    run = makes.random_images(50, 3, 2)
    records = [json.loads(line) for line in run.epochs_path.read_text().splitlines()]
    for row in records:
        row["predictions_sha"] = hashlib.sha256(run.predictions_path(row["epoch"]).read_bytes()).hexdigest()
    run.epochs_path.write_text("".join(json.dumps(row) + "\n" for row in records))
    read_pair((run, 1), (run, 2))
    run.predictions_path(2).write_bytes(run.predictions_path(1).read_bytes())
    with pytest.raises(
        UserError, match=rf"epoch_002\.npz: damaged \(sha256 .*; remove it, and `rayexp evaluate {run.id}@2`"
    ):
        read_pair((run, 1), (run, 2))
