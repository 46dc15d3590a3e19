"""Three checkpoints and more beside a noise floor, by slices, and held against the first: each as the comparison of two
says, and adjusted for their number."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

import rayexp
from rayexp.cli import app
from rayexp.diff.documents import sign_flip
from rayexp.diff.floors import baseline, measured, named, store, stored
from rayexp.diff.images import diff_images
from rayexp.diff.outcome import outcome
from rayexp.diff.pair import read
from rayexp.diff.pairs import diff_pairs
from rayexp.diff.pairs_page import pairs_page
from rayexp.diff.report import Asked, compare
from rayexp.diff.samples import paired
from rayexp.diff.slices import diff_slices
from rayexp.diff.statistics import adjust, difference_interval
from rayexp.errors import UserError

N = 400
LABEL = np.random.default_rng(77).integers(0, 5, N)


def invoke(*words, code=0):
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout


@pytest.fixture
def seeded(makes, arrays):
    """Make a run of three epochs on the same 400 images."""

    def make(seed, skill=0.6, broken=0, **config):
        rng = np.random.default_rng([seed, int(100 * skill)])
        epochs = []
        for better in (skill - 0.2, skill - 0.1, skill):
            first = np.where(rng.random(N) < better, LABEL, rng.integers(0, 5, N))
            loss = np.where(np.arange(N) < broken, np.nan, 1.0)
            epochs.append(arrays.images(LABEL, first, classes=5, loss=loss))
        return makes.images(epochs, 5, config={"seed": seed, **config}, name=f"s{seed}")

    return make


@pytest.fixture
def several(seeded):
    """Four checkpoints, the last of another configuration, and three seeds of the first one's."""
    runs = [seeded(10), seeded(11), seeded(12, skill=0.8), seeded(13, skill=0.95, lr=0.5)]
    return [read(run, 3) for run in runs], [seeded(seed) for seed in (0, 1, 2)]


@pytest.fixture
def light(tmp_path):
    path = tmp_path / "light.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("index", "light", "camera"))
        writer.writerows((i, "day" if i % 3 else "night", i % 4) for i in range(N - 20))
    return path


# ---------------------------------------------------------------------- noise


def test_every_pair_stands_beside_its_floor(several):
    checkpoints, seeds = several
    floors = named(lambda epoch: [(run, epoch) for run in seeds])
    r = diff_pairs(checkpoints, Asked(floors=floors))
    p = []
    for pair in r.pairs:
        a, b = checkpoints[pair.a], checkpoints[pair.b]
        alone = baseline([(run, 3) for run in seeds], a, b, 0.0)
        assert pair.noise.floor.changed.tolist() == alone.changed.tolist()
        assert (pair.noise.churn, pair.noise.share) == (pair.outcome.churn, pair.outcome.churn / N)
        assert pair.noise.difference == pytest.approx(pair.outcome.difference)
        p.append(pair.noise.p)
    adjusted = scipy.stats.false_discovery_control(p)
    assert [pair.noise.adjusted_p for pair in r.pairs] == pytest.approx(adjusted)
    for pair, value in zip(r.pairs, adjusted, strict=True):
        low, high = pair.noise.floor.intervals()[2]
        outside = "more" if pair.noise.share > high else "less" if pair.noise.share < low else "alike"
        assert pair.noise.verdict == (outside if value < 0.05 else "alike")
    assert len(r.floors) == 1
    tree = json.loads(json.dumps(r.to_json(), allow_nan=False))
    assert [row["noise"]["adjusted_p"] for row in tree["pairs"]] == pytest.approx(adjusted)
    assert "Beside another seed" in pairs_page(r)
    assert "Beside another seed" not in pairs_page(diff_pairs(checkpoints))


def test_many_pairs_are_not_more_than_reseeding_by_chance_alone(several):
    """One of the pairs lies just outside its interval, which among six says nothing."""
    checkpoints, seeds = several
    (pair, *_) = diff_pairs(checkpoints, Asked(floors=named(lambda epoch: [(run, epoch) for run in seeds]))).pairs
    floor = pair.noise.floor
    share = floor.intervals()[2][1] + 0.001
    assert 0.04 < floor.p_of(share) < 0.05
    just = type(pair.noise)(floor, round(share * N + 0.5), 0.0, 3)
    assert just.verdict == "more"
    (value, *_) = adjust([just.p, *[1.0] * 5])
    assert type(just)(floor, just.churn, 0.0, 3, adjusted_p=value).verdict == "alike"
    assert type(just)(floor, just.churn, 0.0, 3, adjusted_p=0.049).verdict == "more"


def test_p_is_below_5_percent_where_the_interval_ends(several):
    checkpoints, seeds = several
    floor = baseline([(run, 3) for run in seeds], *checkpoints[:2], 0.0)
    mean, _, (low, high) = floor.intervals()
    assert floor.p_of(mean) == 1
    assert floor.p_of(high) == floor.p_of(low) == pytest.approx(0.05)
    t = scipy.stats.t.ppf(0.975, 2)
    assert floor.p_of(mean + (high - mean) * 1.7) == pytest.approx(2 * scipy.stats.t.sf(1.7 * t, 2))
    two = baseline([(run, 3) for run in seeds[:2]], *checkpoints[:2], 0.0)
    assert two.p_of(0.5) is None


def test_seeds_that_always_agree_know_only_equal_and_more(several):
    checkpoints, seeds = several
    floor = baseline([(run, 3) for run in seeds], *checkpoints[:2], 0.0)
    same = type(floor)(**{name: getattr(floor, name) for name in floor.__slots__} | {"changed": 0 * floor.changed})
    assert (same.p_of(0.0), same.p_of(1 / N)) == (1, 0)


def test_a_floor_of_another_configuration_leaves_a_pair_open(several, seeded):
    """Of the first three checkpoints' configuration, so that pairs with one of these have it."""
    checkpoints, seeds = several
    other = [read(seeded(14, lr=0.5), 3), *checkpoints]
    r = diff_pairs(other, Asked(floors=named(lambda epoch: [(run, epoch) for run in seeds])))
    known = {(p.a, p.b): p.noise is not None for p in r.pairs}
    assert {pair for pair, found in known.items() if not found} == {(0, 4)}
    assert "no floor is known of either configuration" in pairs_page(r)
    strangers = [read(seeded(seed, lr=0.9), 3) for seed in (20, 21, 22)]
    with pytest.raises(UserError, match="another configuration than A and than B"):
        diff_pairs(strangers, Asked(floors=named(lambda epoch: [(run, epoch) for run in seeds])))


def test_a_stored_floor_is_found_for_every_pair(several, tmp_path):
    checkpoints, seeds = several
    store(seeds[0], measured(seeds))
    r = diff_pairs(checkpoints[:3], Asked(floors=stored(tmp_path, pytest.fail)))
    assert [p.noise.floor.epoch for p in r.pairs] == [3, 3, 3]
    words = [f"{c.run.root}@3" for c in checkpoints[:3]]
    assert "another seed changes" in invoke("diff", *words)
    assert [row["noise"]["floor"]["seeds"] for row in json.loads(invoke("diff", *words, "--json"))["pairs"]] == [
        [0, 1, 2]
    ] * 3


# ---------------------------------------------------------------------- slices


def test_slices_of_every_pair_are_adjusted_together(several, light):
    checkpoints, _ = several
    r = diff_pairs(checkpoints, Asked(attributes=light))
    p = []
    for pair in r.pairs:
        alone = diff_slices(checkpoints[pair.a], checkpoints[pair.b], light)
        assert [(s.attribute, s.value) for s in pair.slices.slices] == [(s.attribute, s.value) for s in alone.slices]
        assert [s.outcome.p for s in pair.slices.slices] == [s.outcome.p for s in alone.slices]
        assert (pair.slices.rows, pair.slices.missing, pair.slices.tests) == (N - 20, 20, 36)
        assert alone.tests == 6
        p += [s.outcome.p for s in pair.slices.slices]
    found = [s.outcome.adjusted_p for pair in r.pairs for s in pair.slices.slices]
    assert found == pytest.approx(scipy.stats.false_discovery_control(p))
    assert found != pytest.approx([s.outcome.adjusted_p for x in r.pairs for s in diff_slices(
        checkpoints[x.a], checkpoints[x.b], light).slices])  # fmt: skip
    page = pairs_page(r)
    assert page.count("<details") == 6
    assert "of 36 slices of all pairs changed by more than chance" in page
    assert "20 of 400 images have no row" in page
    tree = json.loads(json.dumps(r.to_json(), allow_nan=False))
    assert [row["slices"]["adjusted_for"] for row in tree["pairs"]] == [36] * 6
    out = invoke("diff", *(f"{c.run.root}@3" for c in checkpoints), "--slice", light, "--limit", 7)
    assert "of 36 slices of all pairs" in out
    assert "the first 7 of 36 slices" in out


# ---------------------------------------------------------------------- against the first


def test_every_other_is_held_against_the_first(several):
    checkpoints, _ = several
    level = 1 - 0.05 / 3
    for max_drop in (0.0, 2.0, 5.0, 30.0):
        r = diff_pairs(checkpoints, Asked(max_drop=max_drop))
        for pair in r.pairs:
            if pair.a:
                assert pair.ruling is None
                continue
            o = pair.outcome
            low, high = difference_interval(o.gained, o.lost, N, level)
            expected = "PASS" if 100 * low > -max_drop else "FAIL" if 100 * high < -max_drop else "INCONCLUSIVE"
            assert pair.ruling.word == expected
            assert "the 98.33 % interval" in pair.ruling.why
    assert diff_pairs(checkpoints).verdict is None


def test_one_that_fails_fails_all_and_one_that_is_open_leaves_all_open(seeded):
    low, mid, high = (read(seeded(1, skill=skill), 3) for skill in (0.3, 0.6, 0.9))
    assert diff_pairs([mid, low, high], Asked(max_drop=1)).verdict == "FAIL"
    assert diff_pairs([low, mid, high], Asked(max_drop=1)).verdict == "PASS"
    assert diff_pairs([mid, read(seeded(2), 3), high], Asked(max_drop=0)).verdict == "INCONCLUSIVE"
    words = [f"{c.run.root}@3" for c in (mid, low, high)]
    out = invoke("diff", *words, "--max-drop", 1, code=1)
    assert "B FAIL: the 97.5 % interval lies beyond what is allowed" in out
    assert "FAIL: all were allowed to be worse than A by 1 points of acc1" in out
    invoke("diff", words[1], words[0], words[2], "--max-drop", 1, code=0)
    tree = json.loads(invoke("diff", *words, "--max-drop", 1, "--json", code=1))
    assert [(row["a"], row["verdict"]) for row in tree["pairs"]] == [(0, "FAIL"), (0, "PASS"), (1, None)]
    assert (tree["verdict"], tree["max_drop"]) == ("FAIL", 1)


def test_none_of_many_passes_by_chance_more_often_than_claimed():
    """Ten checkpoints, each exactly as much worse than the first as is forbidden: that any of them passes has at most
    2.5 %, and without the correction many times that."""
    rng = np.random.default_rng(1)
    n, m, rounds = 300, 10, 200
    lowest = {level: {} for level in (0.95, 1 - 0.05 / m)}
    passed = dict.fromkeys(lowest, 0)
    for drawn in rng.multinomial(n, [0.04, 0.08, 0.88], size=(rounds, m)).tolist():
        for level, known in lowest.items():
            for b, c, _ in drawn:
                if (b, c) not in known:
                    known[b, c] = difference_interval(b, c, n, level)[0]
            passed[level] += any(known[b, c] > -0.04 for b, c, _ in drawn)
    assert passed[1 - 0.05 / m] / rounds <= 0.04
    assert passed[0.95] / rounds > 0.08


@pytest.mark.parametrize("level", [0.9, 0.99])
def test_the_level_of_a_verdict_on_texts(makes, arrays, level):
    rng = np.random.default_rng(0)
    token, loss = rng.integers(0, 4, 3000), rng.gamma(2, 1, 3000)
    other = loss + np.repeat(rng.normal(0.03, 0.1, 60), 50)
    run = makes.text([arrays.tokens(token, x) for x in (loss, other)], list("abcd"))
    a, b = read(run, 1), read(run, 2)
    change = (b.predictions["loss"].astype(float) - a.predictions["loss"]).reshape(60, 50).sum(1)
    _, interval = sign_flip(change, np.full(60, 50), level)
    high = 100 * (math.exp(interval[1]) - 1)
    report = compare(a, b)
    assert report.within(high + 0.01, level).verdict == "PASS"
    assert report.within(high - 0.01, level).verdict == "INCONCLUSIVE"
    assert f"the {100 * level:g} % interval" in report.within(1.0, level).ruling.why


@pytest.mark.parametrize("level", [0.9, 0.99])
def test_the_level_of_a_verdict_on_samples(makes, level):
    rng = np.random.default_rng(0)
    loss = rng.gamma(2, 1, 300)
    run = makes.samples([loss, loss + rng.normal(0.02, 0.2, 300)])
    a, b = (read(run, epoch) for epoch in (1, 2))
    x, y = (c.predictions["loss"].astype(float) for c in (a, b))
    report = compare(a, b)
    for max_drop in np.linspace(0, 6, 25):
        low, high = paired(x - y + max_drop / 100 * x, level)[0]
        expected = "PASS" if low > 0 else "FAIL" if high < 0 else "INCONCLUSIVE"
        assert report.within(float(max_drop), level).verdict == expected


# ---------------------------------------------------------------------- weights, what is not finite, the library


def test_which_weights_moved_is_a_column(several):
    checkpoints, _ = several
    r = diff_pairs([checkpoints[0], read(checkpoints[0].run, 1), read(checkpoints[0].run, 2)], Asked(weights=True))
    # Each epoch's tensor is full of its number: 3, 1 and 2.
    assert [p.weights.relative for p in r.pairs] == pytest.approx([2 / 3, 1 / 3, 1])
    assert "weights moved" in pairs_page(r)
    run = checkpoints[0].run.root
    assert "0.667" in invoke("diff", f"{run}@3", "@1", "@2", "--weights")


def test_what_is_not_finite_is_so_in_every_table(several, seeded, light):
    checkpoints, seeds = several
    broken = read(seeded(15, broken=7), 3)
    asked = Asked(
        max_drop=1.0, floors=named(lambda epoch: [(run, epoch) for run in seeds]), attributes=light, weights=True
    )
    said = diff_pairs([checkpoints[0], checkpoints[1], broken], asked).pairs[1].ruling
    assert "7 of the 400 judgements of C are not finite" in said.why
    r = diff_pairs([checkpoints[0], broken, checkpoints[1]], asked)
    first, third, second = r.pairs
    assert (first.outcome.not_finite, third.outcome.not_finite, second.outcome.not_finite) == (7, 0, 7)
    assert (first.ruling.word, r.verdict) == ("FAIL", "FAIL")
    assert "7 of the 400 judgements of B are not finite" in first.ruling.why
    assert first.noise.churn == first.outcome.churn >= 7
    by_light = [s.outcome.not_finite for s in first.slices.slices if s.attribute == "light"]
    assert sorted(by_light) == [3, 4]  # of the first seven every third is a night shot
    json.dumps(r.to_json(), allow_nan=False)
    page = pairs_page(r)
    assert page.count("not finite</th>") == 4  # checkpoints, pairs, and the slices of the two pairs with such
    rows = list(csv.DictReader(r.to_csv().splitlines()))
    assert [row["not_finite"] for row in rows] == ["7", "0", "7"]
    assert [row["verdict"] for row in rows] == ["FAIL", r.pairs[1].ruling.word, ""]
    assert all(row["reseeding"] in ("more", "alike", "less") for row in rows)


def test_the_library_asks_as_the_command_does(several, light):
    checkpoints, seeds = several
    refs = [f"{c.run.root}@3" for c in checkpoints]
    words = ("--slice", light, "--max-drop", 2, "--weights", "--json", "--baseline", *(run.root for run in seeds))
    keys = {"max_drop": 2, "baseline": [str(run.root) for run in seeds], "slices": light, "weights": True}
    for some in (refs[:2], refs):
        report = rayexp.diff(*some, **keys)
        code = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}[report.verdict]
        printed = json.loads(invoke("diff", *some, *words, code=code))
        assert json.loads(json.dumps(report.to_dict())) == printed
    two = rayexp.diff(refs[0], refs[1], baseline=seeds, slices=str(light))
    assert two.noise.floor.seeds == (0, 1, 2)
    assert two.slices.slices == diff_slices(*checkpoints[:2], light).slices
    assert (two.weights, rayexp.diff(*refs[:2]).noise) == (None, None)


def test_the_library_takes_runs_and_epochs_alone(several):
    run = several[0][0].run
    r = rayexp.diff(run.at(1), "@2", run)
    assert [c.epoch for c in r.checkpoints] == [1, 2, 3]
    assert [c.run.id for c in r.checkpoints] == [run.id] * 3
    assert r.pairs[0].outcome.churn == diff_images(read(run, 1), read(run, 2)).churn
    with pytest.raises(UserError, match="two or more runs"):
        rayexp.diff(run.at(1), "@2", baseline=[run])


def test_an_outcome_of_a_pair_is_that_of_two(several):
    checkpoints, _ = several
    for p in diff_pairs(checkpoints).pairs:
        alone = outcome(checkpoints[p.a], checkpoints[p.b])
        assert (alone.p, alone.interval, alone.churn) == (p.outcome.p, p.outcome.interval, p.outcome.churn)
