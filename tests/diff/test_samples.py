"""Predictions of any other workload: losses of the same samples, compared two by two."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.diff.churn import diff_all
from rayexp.diff.churn_page import churn_page
from rayexp.diff.pair import read_pair
from rayexp.diff.samples import diff_samples, paired
from rayexp.diff.samples_page import samples_page
from rayexp.errors import UserError

NAN = math.nan


def report_of(run, tolerance=None, epochs=(1, 2)):
    return diff_samples(*read_pair((run, epochs[0]), (run, epochs[1])), tolerance)


def invoke(*words, code=0):
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout


def test_by_hand(makes):
    a, b = [1.0, 2.0, 3.0, 4.0, 10.0], [1.0, 2.2, 3.8, 3.0, 4.0]
    r = report_of(makes.samples([a, b], names=list("vwxyz"), unit="houses"))
    assert r.tolerance == pytest.approx(0.3)  # of 1 1 2 2.2 3 3 3.8 4 4 10
    assert (r.unit, r.n, r.lost, r.gained, r.broken, r.churn) == ("houses", 5, 1, 2, 0, 3)
    assert r.loss == pytest.approx((4, 2.8))
    assert r.difference == pytest.approx(-1.2)
    assert [(f.name, f.kind, round(f.loss_b - f.loss_a, 4)) for f in r.flips] == [
        ("x", "lost", 0.8), ("y", "gained", -1.0), ("z", "gained", -6.0)
    ]  # fmt: skip
    change = np.subtract(b, a)
    assert r.interval == pytest.approx(scipy.stats.ttest_1samp(change, 0).confidence_interval(0.95), abs=1e-6)
    # signs of 0.2 0.8 -1.0 -6.0: ranks 1 + 2 against 3 + 4; of 16 sign patterns 3 reach 3 or less, both ways 6
    assert r.wilcoxon_p == pytest.approx(10 / 16)
    assert r.wilcoxon_p == scipy.stats.wilcoxon(np.float32(b) - np.float32(a)).pvalue
    assert (report_of(makes.samples([a, b]), 0.9).churn, report_of(makes.samples([a, b]), 0).churn) == (2, 4)


def test_a_swap_mirrors(makes):
    rng = np.random.default_rng(1)
    a = rng.gamma(2, 1, 300)
    run = makes.samples([a, a + rng.normal(0.1, 0.4, 300)])
    forth, back = report_of(run), report_of(run, epochs=(2, 1))
    assert (forth.lost, forth.gained) == (back.gained, back.lost)
    assert forth.tolerance == back.tolerance
    assert forth.interval == pytest.approx((-back.interval[1], -back.interval[0]))
    assert forth.wilcoxon_p == back.wilcoxon_p


@pytest.mark.parametrize(("n", "skewed"), [(20, False), (100, False), (400, True)])
def test_the_interval_covers_and_the_test_keeps_its_level(n, skewed):
    rng = np.random.default_rng(6)
    held = rejected = 0
    for _ in range(1000):
        change = rng.exponential(1, n) - 1 if skewed else rng.normal(0, 1, n)
        (low, high), p = paired(change)
        held += low <= 0 <= high
        rejected += p < 0.05
    assert 0.93 <= held / 1000 <= 0.97
    if not skewed:  # the signed-rank test asks for another centre of skewed differences
        assert 0.03 <= rejected / 1000 <= 0.07


def test_too_few_and_nothing():
    assert paired(np.array([1.0])) == (None, None)
    assert paired(np.zeros(4)) == ((0, 0), 1.0)


def test_what_is_not_finite_is_a_kind_of_its_own(makes, capsys):
    loss = np.linspace(1, 2, 100)
    broken = np.where(np.arange(100) < 4, NAN, loss)
    broken[50] = 9.0
    run = makes.samples([loss, broken])
    r = report_of(run).within(1)
    assert (r.lost, r.gained, r.broken, r.not_finite, r.churn) == (1, 0, 4, (0, 4), 5)
    assert (r.interval, r.wilcoxon_p, r.verdict) == (None, None, "FAIL")
    assert [f.kind for f in r.flips] == ["not_finite"] * 4 + ["lost"]
    tree = json.loads(json.dumps(r.to_json(), allow_nan=False))
    assert tree["not_finite"] == {"a": 0, "b": 4, "either": 4}
    assert tree["flips"][0]["loss_b"] is None
    assert [row["kind"] for row in csv.DictReader(io.StringIO(r.to_csv()))] == ["not_finite"] * 4 + ["lost"]
    page = samples_page(r)
    assert page.count("✕ not finite") == 4
    out = invoke("diff", f"{run.root}@1", f"{run.root}@2").split("\n")
    assert ["not", "finite", "4"] in [line.split() for line in out]
    assert any("NOT FINITE: 0 of the samples in A, 4 in B" in line for line in out)


@pytest.mark.parametrize(
    ("rise", "max_drop", "code", "word"),
    [(0.0, 1, 0, "PASS"), (0.05, 10, 0, "PASS"), (0.05, 1, 1, "FAIL"), (0.05, 5, 3, "INCONCLUSIVE")],
)
def test_the_gate(makes, rise, max_drop, code, word):
    """A's mean loss is 1, so percent of it are hundredths of the loss."""
    rng = np.random.default_rng(2)
    a = rng.gamma(100, 0.01, 400)
    a /= a.mean()
    noise = rng.normal(0, 0.05, 400) * bool(rise)
    run = makes.samples([a, a + rise + noise - noise.mean()])
    tree = json.loads(invoke("diff", f"{run.root}@1", "@2", "--max-drop", max_drop, "--json", code=code))
    assert (tree["verdict"], tree["goal"]) == (word, {"metric": "val_loss", "better": "min"})
    assert f"{word}: allowed to get worse by {max_drop} percent of val_loss" in invoke(
        "diff", f"{run.root}@1", "@2", "--max-drop", max_drop, code=code
    )


def test_the_gate_is_of_the_first_goal(makes):
    """A score of which more is better, falling by 10 % while the loss falls too."""
    n = np.arange(200)
    wave = 0.001 * np.sin(n)

    def epoch(loss, score):
        return {"index": n, "loss": np.full(200, loss, np.float32) + wave, "score": np.full(200, score) + wave[::-1]}

    run = makes.samples([epoch(2, 0.5), epoch(1, 0.45)], goals={"score": "max", "val_loss": "min"})
    r = report_of(run)
    assert [r.within(x).verdict for x in (9, 11)] == ["FAIL", "PASS"]
    assert report_of(run, epochs=(2, 1)).within(0).verdict == "PASS"
    least = makes.samples([epoch(2, 0.5), epoch(1, 0.45)], goals={"score": "min"})
    assert report_of(least).within(0).verdict == "PASS"
    negative = makes.samples([epoch(2, -0.5), epoch(1, -0.55)], goals={"score": "max"})
    assert [report_of(negative).within(x).verdict for x in (9, 11)] == ["FAIL", "PASS"]


def test_a_goal_that_no_sample_has_is_refused(makes):
    run = makes.samples([[1, 2], [1, 2]], goals={"r2": "max"})
    with pytest.raises(UserError, match=r"predicts no 'r2' for each sample.* its arrays are: loss"):
        report_of(run).within(1)
    assert report_of(run).within(None).goal == ("r2", "max")


def test_names_only_where_there_is_one_for_each(makes):
    assert report_of(makes.samples([[1, 2], [9, 2]], names=["x"])).flips[0].name == "0"
    assert report_of(makes.samples([[1, 2], [9, 2]], names=["x", "y"])).flips[0].name == "x"


def test_the_page_and_the_command(makes, tmp_path):
    rng = np.random.default_rng(0)
    loss = rng.gamma(2, 1, 1500)
    names = [f"<b>{i}</b>" for i in range(1500)]
    run = makes.samples([loss, np.abs(loss + rng.normal(0.05, 0.6, 1500))], names=names)
    page = tmp_path / "p.html"
    out = invoke("diff", f"{run.root}@1", "@2", "--html", page, "--limit", 3)
    assert "Wilcoxon's signed ranks" in out
    assert "the first 3 of" in out
    text = page.read_text()
    assert "<b>1</b>" not in text
    assert "500 of" in text
    assert text.count("<path class=") == 3
    assert samples_page(report_of(run, epochs=(1, 1))).count("No loss moved") == 1
    tree = json.loads(invoke("diff", f"{run.root}@1", "@2", "--json"))
    assert {"n", "churn", "gained", "lost", "wilcoxon_p", "tolerance", "flips"} <= tree.keys()
    assert len(tree["flips"]) == min(1000, tree["churn"])


def test_all_epochs(makes):
    run = makes.samples([[1, 2, 3, 4], [1, 2, 3.5, 1], [1, 2, 3.4, 1.05]])
    r = diff_all(run, [1, 2, 3])
    assert r.tolerance == pytest.approx(0.1 * 1.525)
    assert [(e.changed, e.forgotten, e.learned) for e in r.epochs] == [(None, None, None), (50, 1, 1), (0, 0, 0)]
    assert r.epochs[0].metric == 2.5
    assert "lost" in churn_page(r)
    assert "val_loss" in churn_page(r)
    assert "val_loss" in invoke("diff", "--all", run.root)


def test_damage_is_named(makes):
    run = makes.samples([{"index": np.arange(3)[::-1].copy(), "loss": np.ones(3)}, [1, 2, 3]])
    with pytest.raises(UserError, match="index does not rise strictly"):
        report_of(run)
