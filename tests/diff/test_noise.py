"""The noise floor: where it is from, what is beside it, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.cli.diff import spread
from rayexp.diff.changes import churn
from rayexp.diff.floors import FOLDER, baseline, beside, find, measured, path_of, store
from rayexp.diff.images import diff_images
from rayexp.diff.images_page import image_page
from rayexp.diff.noise import NoiseComparison, NoiseFloor, floor_of
from rayexp.diff.pair import read
from rayexp.errors import UserError

LABEL = np.random.default_rng(77).integers(0, 5, 400)


@pytest.fixture
def seeded(makes, arrays):
    """Make a run of two epochs on the same 400 images; the keys are those of its configuration."""

    def make(seed, skill=0.6, n=400, **config):
        rng = np.random.default_rng([seed, int(100 * skill)])
        epochs = []
        for better in (skill - 0.2, skill):
            first = np.where(rng.random(400) < better, LABEL, rng.integers(0, 5, 400))
            epochs.append(arrays.images(LABEL[:n], first[:n], classes=5))
        return makes.images(epochs, 5, config={"seed": seed, **config}, name=f"s{seed}", data_sha=f"{n:064}")

    return make


def invoke(*words, code=0):
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def test_a_floor_of_runs(seeded):
    runs = [seeded(seed) for seed in (3, 1, 2)]
    floor = floor_of([read(run, 2) for run in runs], 2, 0.0)
    assert (floor.seeds, floor.n, floor.epoch, floor.epochs) == ((3, 1, 2), 400, 2, 2)
    assert floor.changed.tolist() == floor.changed.T.tolist()
    assert [x[:2] for x in floor.pairs()] == [(3, 1), (3, 2), (1, 2)]
    for (i, j), (_, _, count) in zip([(0, 1), (0, 2), (1, 2)], floor.pairs(), strict=True):
        assert count == churn(runs[i].predictions(2), runs[j].predictions(2))
    assert floor.values.tolist() == [run.records()[1].metrics["acc1"] for run in runs]
    mean, of_mean, of_pair = floor.intervals()
    assert mean == pytest.approx(np.mean([c for *_, c in floor.pairs()]) / 400)
    assert 0 <= of_pair[0] <= of_mean[0] <= mean <= of_mean[1] <= of_pair[1] <= 1
    two = floor_of([read(run, 2) for run in runs[:2]], 2, 0.0)
    assert two.intervals()[1:] == (None, None)
    assert two.reach() is None


def compared(changed, floor, difference=0.0, epochs=2):
    return NoiseComparison(floor, changed, difference, epochs)


def floor_with(counts, m=3, values=(50.0, 51.0, 52.0), **more):
    changed = np.zeros((m, m), np.int64)
    changed[np.triu_indices(m, 1)] = counts
    fields = {
        "kind": "images", "data_sha": "d", "n": 1000, "epochs": 2, "epoch": 2, "tolerance": 0.0,
        "seeds": tuple(range(m)), "runs": tuple("abcdef"[:m]), "changed": changed + changed.T,
        "values": np.array(values),
    }  # fmt: skip
    return NoiseFloor(**{**fields, **more})


def test_more_alike_and_less():
    floor = floor_with([300, 310, 290])
    _, _, (low, high) = floor.intervals()
    inside = (0.3 + high) / 2, 0.3, (0.3 + low) / 2  # the mean decides nothing
    shares = high + 0.002, *inside, low - 0.002
    found = [compared(round(1000 * x), floor).verdict for x in shares]
    assert found == ["more", "alike", "alike", "alike", "less"]
    assert "more than reseeding changes" in compared(999, floor).headline
    assert compared(300, floor).headline == "no more than reseeding changes"
    assert (
        "30.0 % changed; another seed changes 30.0 % on average (3 seeds at epoch 2)" in compared(300, floor).sentence()
    )
    two = floor_with([300], 2, (50.0, 51.0))
    assert compared(900, two).verdict is None
    assert "a third would" in compared(900, two).headline
    assert "interval" not in compared(900, two).sentence()


def test_the_difference_of_the_metric_beside_that_of_seeds():
    floor = floor_with([300, 310, 290])  # a standard deviation of 1
    reach = scipy.stats.t.ppf(0.975, 2) * math.sqrt(2)
    assert floor.reach() == pytest.approx(reach)
    assert compared(300, floor, reach + 0.01).difference_verdict == "more"
    assert compared(300, floor, -reach - 0.01).difference_verdict == "more"
    assert compared(300, floor, reach - 0.01).difference_verdict == "alike"
    assert (
        "acc1 +1.00 points: no more than another seed brings about" in compared(300, floor, 1.0).difference_sentence()
    )
    broken = floor_with([300, 310, 290], values=(50.0, math.nan, 52.0))
    assert (broken.reach(), compared(300, broken, 1.0).difference_sentence()) == (None, "")
    assert json.loads(json.dumps(compared(300, broken).to_json(), allow_nan=False))["floor"]["values"][1] is None


def test_seeds_that_always_agree():
    floor = floor_with([0, 0, 0])
    assert floor.intervals() == (0, (0, 0), (0, 0))
    assert compared(0, floor).verdict == "alike"
    assert compared(1, floor).verdict == "more"


def test_shorter_runs_are_said():
    assert (
        "(3 seeds at epoch 2 of 2, in shorter runs than A's 20 epochs)"
        in compared(300, floor_with([300, 310, 290]), epochs=20).sentence()
    )


def test_baseline_on_the_command_line(seeded, tmp_path):
    a, b = seeded(10), seeded(11, skill=0.9, lr=0.5)
    runs = [seeded(seed) for seed in (0, 1, 2)]
    page = tmp_path / "page.html"
    words = ("diff", f"{a.root}@2", f"{b.root}@2", "--html", page, "--baseline", *(run.root for run in runs))
    tree = json.loads(invoke(*words, "--json").stdout)
    noise = tree["noise"]
    assert noise["floor"]["seeds"] == [0, 1, 2]
    assert noise["floor"]["pairs"][0]["changed"] == churn(runs[0].predictions(2), runs[1].predictions(2))
    assert noise["churn_rate"] == tree["churn"] / 400
    assert noise["difference"] == pytest.approx(tree["acc1"]["b"] - tree["acc1"]["a"])
    low, high = noise["floor"]["pair_interval"]
    assert noise["verdict"] == (
        "more" if noise["churn_rate"] > high else "less" if noise["churn_rate"] < low else "alike"
    )
    assert noise["difference_verdict"] == "more"
    text = page.read_text()
    assert "Beside another seed" in text
    assert text.count('title="seeds ') == 3
    out = invoke(*words).stdout
    assert "another seed changes" in out
    assert "more than another seed brings about" in out
    assert json.loads(invoke("diff", f"{a.root}@2", f"{b.root}@2", "--json").stdout)["noise"] is None


def test_a_bare_run_is_taken_at_the_epoch_of_b(seeded):
    a, runs = seeded(10), [seeded(seed) for seed in (0, 1)]
    for ref in ("@1", "@2"):
        words = ("diff", f"{a.root}@2", ref, "--json", "--baseline", *(run.root for run in runs))
        assert json.loads(invoke(*words).stdout)["noise"]["floor"]["epoch"] == int(ref[1:])
    words = ("diff", f"{a.root}@2", "@2", "--json", "--baseline", *(f"{run.root}@1" for run in runs))
    assert json.loads(invoke(*words).stdout)["noise"]["floor"]["epoch"] == 1


def test_an_option_takes_the_words_up_to_the_next():
    assert spread(["A", "B", "--baseline", "R", "S", "--csv", "F"], "--baseline") == [
        "A", "B", "--baseline", "R", "--baseline", "S", "--csv", "F"
    ]  # fmt: skip
    assert spread(["--baseline", "R", "--json", "A"], "--baseline") == ["--baseline", "R", "--json", "A"]


def test_a_baseline_differs_by_its_seed_alone(seeded):
    a, b, other = seeded(10), seeded(11), seeded(12, lr=0.7)
    places = [(seeded(seed), 2) for seed in (0, 1)]
    first, second = read(a, 2), read(b, 2)
    assert baseline(places, first, second, 0.0).seeds == (0, 1)
    assert baseline(places, read(other, 2), second, 0.0).seeds == (0, 1)  # of B's configuration
    for wrong, match in [
        ([places[0]], "two or more runs"),
        ([*places, (seeded(1), 2)], "same seed, 1"),
        ([*places, (seeded(5, lr=0.7), 2)], r"differ by more than their seed: lr \(the default and 0.7\)"),
        ([*places, (seeded(5, epochs=3), 2)], r"differ by more than their seed: epochs \(2 and 3\)"),
        ([places[0], (places[1][0], 1)], "different epochs"),
        ([(seeded(6, n=300), 2), places[0]], "different validation data"),
    ]:
        with pytest.raises(UserError, match=match):
            baseline(wrong, first, second, 0.0)
    with pytest.raises(UserError, match=r"another configuration than A and than B.* lr \(0.7 and the default\)"):
        baseline(places, read(other, 2), read(other, 1), 0.0)


# ---------------------------------------------------------------------- stored floors


def no_note(text):
    pytest.fail(text)


def test_only_seeds_make_a_floor(seeded):
    with pytest.raises(UserError, match=r"differ by more than their seed: precision \(the default and bf16\)"):
        measured([seeded(0), seeded(1, precision="bf16")])


def test_a_stored_floor_is_found_by_the_configuration(seeded, tmp_path):
    runs = [seeded(seed) for seed in (0, 1, 2)]
    floors = measured(runs)
    assert [f.epoch for f in floors] == [1, 2]
    path = store(runs[0], floors)
    assert path.parent == runs[0].root.parent / FOLDER
    a, b = read(seeded(8), 1), read(seeded(9, lr=0.5), 2)
    for pair, epoch in (((a, b), 2), ((b, a), 1)):  # A's or B's configuration; the epoch is B's
        found = find(*pair, tmp_path, 0.0, no_note)
        expected = floors[epoch - 1]
        assert found.changed.tolist() == expected.changed.tolist()
        assert dataclasses.replace(found, changed=0, values=0) == dataclasses.replace(
            expected, changed=0, values=0, source=found.source
        )
        assert found.values.tolist() == expected.values.tolist()
    assert find(b, b, tmp_path, 0.0, no_note) is None
    tree = json.loads(invoke("diff", f"{a.run.root}@2", f"{b.run.root}@2", "--json").stdout)
    assert tree["noise"]["floor"]["seeds"] == [0, 1, 2]
    places = seeded(7, scaling={"num_workers": 2}, max_failures=1)  # who computes it is not what is trained
    assert find(read(places, 2), b, tmp_path, 0.0, no_note) is not None
    small = read(seeded(7, n=300), 2)
    assert find(small, small, tmp_path, 0.0, no_note) is None  # of other data


def test_floors_of_as_many_epochs_go_first_and_then_the_longest(seeded, tmp_path):
    made = {}
    for epochs in (2, 3, 5):
        runs = [seeded(seed, epochs=epochs) for seed in (0, 1, 2)]
        made[epochs] = store(runs[0], measured(runs))
    assert len(set(made.values())) == 3
    a, long = read(seeded(8), 2), read(seeded(8, epochs=9), 2)
    assert find(a, a, tmp_path, 0.0, no_note).epochs == 2
    found = find(long, long, tmp_path, 0.0, no_note)
    assert (found.epochs, found.epoch) == (5, 2)
    said = beside(found, long, long, 3).sentence()
    assert "in shorter runs than A's 9 epochs" in said


def test_a_floor_at_another_tolerance_is_counted_anew(makes, tmp_path):
    rng = np.random.default_rng(1)
    runs = [makes.samples([rng.gamma(2, 1, 200)], name=f"r{seed}", config={"seed": seed}) for seed in (0, 1, 2, 3)]
    floors = measured(runs[:3])
    store(runs[0], floors)
    side = read(runs[3], 1)
    assert find(side, side, tmp_path, floors[0].tolerance, no_note).changed.tolist() == floors[0].changed.tolist()
    anew = find(side, side, tmp_path, 0.9, no_note)
    assert anew.tolerance == 0.9
    assert anew.changed[0, 1] == churn(runs[0].predictions(1), runs[1].predictions(1), 0.9) < floors[0].changed[0, 1]
    runs[1].predictions_path(1).unlink()
    notes = []
    assert find(side, side, tmp_path, 0.9, notes.append) is None
    assert "its runs cannot be read" in notes[0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"seeds": [\n    0,', '"seeds": ['),
        lambda text: text.replace('"epochs": 2', '"epochs": "two"'),
    ],
)
def test_a_damaged_file_is_named(seeded, tmp_path, spoil):
    runs = [seeded(seed) for seed in (0, 1, 2)]
    path = store(runs[0], measured(runs))
    path.write_text(spoil(path.read_text()))
    side = read(seeded(8), 2)
    with pytest.raises(UserError, match="not a noise floor"):
        find(side, side, tmp_path, 0.0, no_note)


def test_a_file_of_another_layout_or_key_is_passed_over(seeded, tmp_path):
    runs = [seeded(seed) for seed in (0, 1, 2)]
    path = store(runs[0], measured(runs))
    side, text = read(runs[0], 2), path.read_text()
    for old, new in (('"layout": 1', '"layout": 2'), ('"key": "', '"key": "0')):
        path.write_text(text.replace(old, new))
        assert find(side, side, tmp_path, 0.0, no_note) is None


def test_the_place_follows_from_the_identity(seeded):
    names = {
        path_of(seeded(seed, lr=lr, epochs=epochs)).name for seed in (0, 1) for lr in (0.1, 0.2) for epochs in (1, 2)
    }
    assert len(names) == 4


def test_the_page_of_two_seeds_has_no_bar(seeded):
    runs = [seeded(seed) for seed in (0, 1)]
    a, b = read(seeded(5), 1), read(seeded(5), 2)
    report = diff_images(a, b)
    floor = floor_of([read(run, 2) for run in runs], 2, 0.0)
    page = image_page(report.beside(beside(floor, a, b, report.churn)))
    assert page.count('title="seeds ') == 1
    assert "jackknife over seeds" not in page
    assert "Two seeds alone tell nothing" in page
