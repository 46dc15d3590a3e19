"""Three checkpoints and more, and slices: each row against the comparison of two, the correction, files, refusals."""

from __future__ import annotations

import csv
import io
import itertools
import json

import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.diff.documents import sign_flip
from rayexp.diff.images import diff_images
from rayexp.diff.outcome import adjusted, outcome
from rayexp.diff.pair import read
from rayexp.diff.pairs import diff_pairs
from rayexp.diff.pairs_page import pairs_page
from rayexp.diff.slices import diff_slices
from rayexp.diff.text import diff_text
from rayexp.errors import UserError

NAN = np.nan


def invoke(*words, code=0):
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout


def lines_of_text(arrays, makes, n=3000, epochs=3):
    rng = np.random.default_rng(0)
    token, loss = rng.integers(0, 4, n), rng.gamma(2, 1, n)
    made = [arrays.tokens(token, loss + e * rng.normal(0.1, 1, n)) for e in range(epochs)]
    return makes.text(made, ["a", "b", "c", "d"])


def test_pairs_of_images_are_those_of_two(makes):
    run = makes.random_images(600, 6, 4, seed=3)
    checkpoints = [read(run, epoch) for epoch in (1, 2, 4)]
    r = diff_pairs(checkpoints)
    assert [(p.a, p.b) for p in r.pairs] == [(0, 1), (0, 2), (1, 2)]
    for p in r.pairs:
        two, o = diff_images(checkpoints[p.a], checkpoints[p.b]), p.outcome
        assert (o.n, o.a, o.b) == (two.n, *two.acc1)
        assert (o.gained, o.lost, o.other_wrong, o.churn) == (two.gained, two.lost, two.other_wrong, two.churn)
        assert (o.difference, o.interval, o.p) == (two.difference, two.interval, two.mcnemar_p)
    p = [pair.outcome.p for pair in r.pairs]
    assert [pair.outcome.adjusted_p for pair in r.pairs] == pytest.approx(scipy.stats.false_discovery_control(p))
    assert r.changed == sum(pair.outcome.adjusted_p < 0.05 for pair in r.pairs) > 0
    matrix = np.array(r.churn_matrix())
    assert matrix[2, 0] == matrix[0, 2] == 100 * r.pairs[1].outcome.churn / 600
    assert np.diag(matrix).tolist() == [0, 0, 0]
    assert r.measures == tuple(run.records()[e - 1].metrics["acc1"] for e in (1, 2, 4))


def test_pairs_of_texts_are_those_of_two(makes, arrays):
    run = lines_of_text(arrays, makes)
    checkpoints = [read(run, epoch) for epoch in (1, 2, 3)]
    for p in diff_pairs(checkpoints).pairs:
        two, o = diff_text(checkpoints[p.a], checkpoints[p.b]), p.outcome
        assert (o.a, o.b) == pytest.approx(two.ppl)
        assert (o.gained, o.lost, o.p) == (two.gained, two.lost, two.paired_p)
        assert o.difference == pytest.approx(100 * (two.ratio - 1))
        assert o.interval == pytest.approx([100 * (x - 1) for x in two.ratio_interval])


def test_what_is_not_finite_is_a_column(makes, arrays):
    label = np.zeros(40, np.int64)
    loss = np.where(np.arange(40) < 7, NAN, 1.0)
    whole, broken = arrays.images(label, label, classes=2), arrays.images(label, label, classes=2, loss=loss)
    run = makes.images([whole, whole, broken], 2)
    r = diff_pairs([read(run, e) for e in (1, 2, 3)])
    assert r.not_finite == (0, 0, 7)
    assert [(p.outcome.not_finite, p.outcome.lost, p.outcome.churn) for p in r.pairs] == [
        (0, 0, 0), (7, 0, 7), (7, 0, 7)
    ]  # fmt: skip
    assert r.pairs[1].outcome.b == pytest.approx(100 * 33 / 40)
    assert "7 of C" in pairs_page(r)
    text = makes.text(
        [arrays.tokens([0, 1] * 60, np.where(np.arange(120) < x, NAN, 1.0)) for x in (0, 0, 9)], ["a", "b"]
    )
    tree = json.loads(json.dumps(diff_pairs([read(text, e) for e in (1, 2, 3)]).to_json(), allow_nan=False))
    assert [row["not_finite"] for row in tree["pairs"]] == [0, 9, 9]
    assert [row["p"] is None for row in tree["pairs"]] == [False, True, True]
    assert tree["pairs"][0]["adjusted_p"] == 1  # of one test, not of three
    out = invoke("diff", f"{text.root}@1", "@2", "@3")
    assert "not finite" in out


def test_pairs_on_the_command_line(makes, tmp_path):
    run = makes.random_images(300, 5, 4)
    words = ("diff", f"{run.root}@1", "@2", "@3", "@4", "--csv", tmp_path / "l.csv", "--html", tmp_path / "p.html")
    tree = json.loads(invoke(*words, "--json"))
    assert len(tree["pairs"]) == 6
    assert [c["epoch"] for c in tree["checkpoints"]] == [1, 2, 3, 4]
    rows = list(csv.DictReader((tmp_path / "l.csv").open(newline="")))
    assert [int(row["churn"]) for row in rows] == [p["churn"] for p in tree["pairs"]]
    assert [float(row["adjusted_p"]) for row in rows] == [p["adjusted_p"] for p in tree["pairs"]]
    assert (tmp_path / "p.html").read_text().count("<rect ") == 16
    out = invoke(*words)
    assert "pairs differ by more than chance" in out
    assert "A to D" not in out
    assert " A D " in out


def test_refused_pairs(makes):
    run, other = makes.random_images(50, 3, 2), makes.random_images(60, 3, 2, data_sha="e" * 64)
    with pytest.raises(UserError, match="different validation data"):
        diff_pairs([read(run, 1), read(run, 2), read(other, 1)])
    with pytest.raises(UserError, match="named twice"):
        diff_pairs([read(run, 1), read(run, 2), read(run, 1)])
    swapped = makes.random_images(50, 3, 2, seed=5)
    with pytest.raises(UserError, match="disagree on the labels"):
        diff_pairs([read(run, 1), read(run, 2), read(swapped, 1)])


# ---------------------------------------------------------------------- slices


@pytest.fixture
def night(makes):
    """A run of 300 images, and a table that knows the light of all but ten and the weather of a third."""
    run = makes.random_images(300, 5, 2, seed=2)
    light = ["night" if i % 3 else "day" for i in range(290)]
    weather = ["rain" if i % 6 == 0 else "" if i % 3 else "sun" for i in range(290)]
    return run, light, weather


def table(path, head, *columns):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(zip(*columns, strict=True))
    return path


@pytest.mark.parametrize("key", ["name", "index"])
def test_slices_by_hand(night, tmp_path, key):
    run, light, weather = night
    first = [f"val_{i}.JPEG" if key == "name" else i for i in range(290)]
    path = table(tmp_path / "s.csv", [key, "light", "weather"], first, light, weather)
    a, b = read(run, 1), read(run, 2)
    r = diff_slices(a, b, path)
    assert (r.rows, r.missing, r.things) == (290, 10, "images")
    assert "10 of 300 images have no row in s.csv" in r.note()
    assert {(s.attribute, s.value) for s in r.slices} == {
        ("light", "night"), ("light", "day"), ("weather", "rain"), ("weather", "sun")
    }  # fmt: skip
    label = a.predictions["label"]
    right = [x.predictions["top5"][:, 0] == label for x in (a, b)]
    for s in r.slices:
        values = {"light": light, "weather": weather}[s.attribute]
        rows = [i for i, v in enumerate(values) if v == s.value]
        gained = sum(not right[0][i] and right[1][i] for i in rows)
        lost = sum(right[0][i] and not right[1][i] for i in rows)
        assert (s.outcome.n, s.outcome.gained, s.outcome.lost) == (len(rows), gained, lost)
        assert s.outcome.p == pytest.approx(scipy.stats.binomtest(gained, gained + lost).pvalue)
    p = [s.outcome.p for s in r.slices]
    assert [s.outcome.adjusted_p for s in r.slices] == pytest.approx(scipy.stats.false_discovery_control(p))
    for _, group in itertools.groupby(r.slices, key=lambda s: s.attribute):
        falls = [s.outcome.difference for s in group]
        assert falls == sorted(falls)


def test_slices_on_the_command_line(night, tmp_path):
    run, light, _ = night
    path = table(tmp_path / "s.csv", ["index", "light"], range(290), light)
    words = ("diff", f"{run.root}@1", "@2", "--slice", path, "--html", tmp_path / "p.html")
    tree = json.loads(invoke(*words, "--json"))["slices"]
    assert [row["n"] for row in tree["slices"]] == [97, 193] or [row["n"] for row in tree["slices"]] == [193, 97]
    assert tree["missing"] == 10
    assert "10 of 300 images have no row" in invoke(*words)
    assert "10 of 300 images have no row" in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "it is empty"),
        ("image,light\nval_1.JPEG,day\n", "the first line is 'image,light'; expected `name` or `index`"),
        ("name\nval_1.JPEG\n", "the first line is 'name'"),
        ("name,light,light\nval_1.JPEG,a,b\n", "the first line"),
        ("name,light\nval_1.JPEG\n", "row 2 has 1 cell; expected 2"),
        ("name,light\nval_1.JPEG,day\nval_x.JPEG,day\nval_1.PNG,day\n", "'val_x.JPEG', 'val_1.PNG': no such images"),
        ("index,light\n300,day\n", "index '300': no such images; expected 0 to 299"),
        ("index,light\n-1,day\n", "index '-1': no such images"),
        ("index,light\n1,day\n1,night\n", "index '1' has several rows"),
        ("name,light\n", "describes none of the images"),
        ('name,light\n"val_1.JPEG,day\n', "is no table in CSV"),
        ("name;light\nval_1.JPEG;day\n", "the first line is 'name;light'; expected .* with commas between"),
        ("name,light\nval_1.JPEG,h\xe4ll\n", r"not UTF-8 \(byte 24\); save it as CSV in UTF-8"),
    ],
)
def test_refused_tables(night, tmp_path, text, match):
    run = night[0]
    (tmp_path / "s.csv").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=match):
        diff_slices(read(run, 1), read(run, 2), tmp_path / "s.csv")


def test_many_unknown_names_are_counted(night, tmp_path):
    run = night[0]
    path = table(tmp_path / "s.csv", ["name", "light"], [f"x{i}" for i in range(9)], ["day"] * 9)
    with pytest.raises(UserError, match="'x4' and 4 more: no such images"):
        diff_slices(read(run, 1), read(run, 2), path)


def test_slices_of_text_are_of_whole_documents(makes, arrays, tmp_path):
    run = lines_of_text(arrays, makes)
    a, b = read(run, 1), read(run, 2)
    genre = ["news" if i < 20 else "fiction" for i in range(60)]
    r = diff_slices(a, b, table(tmp_path / "s.csv", ["index", "genre"], range(60), genre))
    assert (r.things, r.rows, r.missing) == ("blocks", 60, 0)
    change = (b.predictions["loss"].astype(float) - a.predictions["loss"]).reshape(60, 50).sum(1)
    for s in r.slices:
        rows = [i for i, g in enumerate(genre) if g == s.value]
        assert s.outcome.n == 50 * len(rows)
        assert s.outcome.p == sign_flip(change[rows], np.full(len(rows), 50))[0]
    titles = [d.title for d in diff_text(a, b).documents]
    by_name = diff_slices(a, b, table(tmp_path / "t.csv", ["name", "genre"], titles, genre))
    assert by_name.slices == r.slices


def test_one_document_has_no_test(makes, arrays, tmp_path):
    run = lines_of_text(arrays, makes)
    r = diff_slices(read(run, 1), read(run, 2), table(tmp_path / "s.csv", ["index", "g"], [0, 1, 2], ["x", "y", "y"]))
    found = {s.value: s.outcome for s in r.slices}
    assert (found["x"].p, found["x"].adjusted_p, found["x"].interval) == (None, None, None)
    assert found["y"].p == found["y"].adjusted_p  # of one test
    assert (r.rows, r.missing) == (3, 57)


def test_adjusting_nothing():
    assert adjusted([]) == []


def test_outcomes_of_samples(makes):
    rng = np.random.default_rng(3)
    loss = rng.gamma(2, 1, 200)
    run = makes.samples([loss, loss + rng.normal(0.2, 0.5, 200), np.where(np.arange(200) < 3, NAN, loss)])
    a, b, c = (read(run, e) for e in (1, 2, 3))
    keep = np.arange(200) < 80
    o = outcome(a, b, keep, 0.5)
    change = (b.predictions["loss"].astype(float) - a.predictions["loss"])[keep]
    assert (o.n, o.lost, o.gained) == (80, int((change > 0.5).sum()), int((change < -0.5).sum()))
    assert o.p == scipy.stats.wilcoxon(change).pvalue
    assert o.interval == pytest.approx(scipy.stats.ttest_1samp(change, 0).confidence_interval(0.95))
    broken = outcome(a, c, keep, 0.5)
    assert (broken.not_finite, broken.p, broken.interval) == (3, None, None)
    r = diff_pairs([a, b, c])
    assert r.tolerance > 0
    assert "wilcoxon" in pairs_page(r).lower()
    assert csv.DictReader(io.StringIO(r.to_csv())).fieldnames[-3:] == ["not_finite", "lost", "gained"]
