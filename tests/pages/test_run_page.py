"""The page of a run: curves over the steps, what an image model is wrong about, what a language model writes."""

from __future__ import annotations

import html
import json
import math
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.config import DataConfig, ExperimentConfig, parse
from rayexp.data import open_data
from rayexp.launch.driver import run as train
from rayexp.launch.sample import WORDS
from rayexp.pages import plots
from rayexp.pages.judgements import PAIRS, WORST, judgements_of
from rayexp.pages.run_page import lead, write_run_page
from rayexp.runs.records import EpochRecord, best
from rayexp.runs.residency import Residency

HOSTILE = "</script><img src=x onerror=alert(1)>"


def page_of(run, sample=None):
    path = run.root / "report.html"
    write_run_page(path, run, sample)
    return path.read_text()


def record(epoch, step):
    return EpochRecord(epoch, step, 1.0, 1.0, {"acc1": 1.0}, 0.1, 1.0, {"total": 1.0}, "a")


def test_the_page_says_how_a_gpu_was_used(makes, arrays):
    run = makes.images([arrays.images([0, 1], [0, 0], classes=2)], 2)
    assert "On the GPU" not in page_of(run)
    run.update(capture="graph", lanes=8, residency=Residency(True, 1_283_000_000, 80 * 10**9, "auto").to_json())
    (line,) = run.epochs_path.read_text().splitlines()
    run.epochs_path.write_text(json.dumps(json.loads(line) | {"peak_memory": {"host": 1, "device": 3_400_000_000}}))
    said = "On the GPU: replicas: 8; steps: replayed from CUDA graphs; samples: 1.28 GB, kept in the GPU's memory; "
    assert said + "peak memory: 3.40 GB" in html.unescape(page_of(run)).replace("\u00a0", " ")


# ---------------------------------------------------------------------- steps


def drawn(monkeypatch, records, lines):
    """The curves as they are handed to the plot: step, loss, lr."""
    seen = []
    thinned = plots.thinned
    monkeypatch.setattr(plots, "thinned", lambda points: seen.append(points) or thinned(points))
    svg = plots.step_curves(records, lines, "images")
    return svg, [tuple(row) for row in seen[0].tolist()] if seen else []


def test_one_epoch_has_a_curve(makes, arrays):
    run = makes.images([arrays.images([0, 1], [0, 0], classes=2)], 2)
    assert "fig-steps" not in page_of(run)  # an older rayexp's
    assert "Learning rate and throughput" in page_of(run)
    run.steps_path.write_text(json.dumps({"epoch": 1, "first": True, "loss": [3.0, 2.0], "lr": [0.1, 0.2]}) + "\n")
    run.epochs_path.write_text(run.epochs_path.read_text().replace('"step": 1', '"step": 2'))
    page = page_of(run)
    assert page.count('<figcaption id="fig-steps">') == 1
    assert "Learning rate and throughput" not in page  # the rate is drawn over the steps


def test_steps_have_their_place_in_the_run(monkeypatch):
    lines = [
        {"epoch": 1, "total": [0.1] * 3},  # an older rayexp
        {"epoch": 2, "loss": [None, 2.0, 1.5], "lr": [None, 0.2, 0.3]},  # and a resume within this one
        {"epoch": 3, "loss": [1.0, 0.5, 0.25], "lr": [0.3, 0.2, 0.1]},
        {"epoch": 4, "loss": [9.0], "lr": [9.0]},  # has no record
    ]
    svg, points = drawn(monkeypatch, [record(1, 3), record(2, 6), record(3, 9)], lines)
    assert points == [(5, 2.0, 0.2), (6, 1.5, 0.3), (7, 1.0, 0.3), (8, 0.5, 0.2), (9, 0.25, 0.1)]
    assert svg.startswith("<svg")
    assert drawn(monkeypatch, [record(1, 3)], lines[:1]) == ("", [])


def test_a_long_run_is_thinned_to_means():
    n = 3 * plots.POINTS + 1
    points = np.stack([np.arange(n), 2.0 * np.arange(n)], 1)
    step, value = plots.thinned(points)
    assert plots.POINTS / 2 < len(step) <= plots.POINTS
    assert step[0] == 1.5  # of 0, 1, 2, 3
    assert step[-1] == n - 1  # a part of its own
    assert np.array_equal(value, 2 * step)
    few = np.arange(12.0).reshape(6, 2)
    assert np.array_equal(plots.thinned(few), few.T)


def test_smoothing_keeps_level_and_slope():
    assert np.allclose(plots.smoothed(np.full(200, 3.0)), 3.0)
    line = np.arange(200.0)
    assert np.allclose(plots.smoothed(line)[5:-5], line[5:-5])
    noise = np.random.default_rng(0).normal(0, 1, 400)
    assert plots.smoothed(noise).std() < 0.4
    assert plots.smoothed(np.array([1.0])).tolist() == [1.0]


def test_a_damaged_line_of_steps_does_not_stop_the_page(makes, arrays):
    run = makes.images([arrays.images([0, 1], [0, 0], classes=2)], 2)
    run.steps_path.write_text('{"epoch": 1, "loss": "much", "lr": [1]}\n')
    assert "fig-steps" not in page_of(run)


# ---------------------------------------------------------------------- judgements


def test_the_figures_are_those_of_the_predictions(makes, arrays):
    label = [0, 0, 0, 0, 1, 1, 2, 2, 2]
    first = [0, 0, 1, 2, 1, 0, 1, 1, 2]
    loss = [0.1, 0.2, 3.0, 2.0, 0.3, 4.0, 5.0, 1.0, 0.1]
    found = judgements_of(makes.images([arrays.images(label, first, classes=4, loss=loss)], 4), 1)
    assert found.names == ("thing 0", "thing 1", "thing 2")  # nothing is of class 3, or taken for it
    assert found.matrix.tolist() == [[2, 1, 1], [1, 1, 0], [0, 2, 1]]
    assert [(c.name, c.n, c.right) for c in found.classes] == [("thing 2", 3, 1), ("thing 0", 4, 2), ("thing 1", 2, 1)]
    assert [c.mistaken.predicted for c in found.classes] == ["thing 1", "thing 1", "thing 0"]
    pairs = [(p.label, p.predicted, p.count, p.share) for p in found.pairs]
    assert pairs[0] == ("thing 2", "thing 1", 2, pytest.approx(2 / 3))
    assert {p[:3] for p in pairs[1:]} == {
        ("thing 0", "thing 1", 1),
        ("thing 0", "thing 2", 1),
        ("thing 1", "thing 0", 1),
    }
    assert [w.name for w in found.worst[:3]] == ["val_6.JPEG", "val_5.JPEG", "val_2.JPEG"]
    assert (found.worst[0].label, found.worst[0].predicted, found.worst[0].right) == ("thing 2", "thing 1", False)
    assert [w.loss for w in found.worst] == sorted(np.float32(loss).tolist(), reverse=True)


def test_what_is_not_finite_is_counted_apart_and_is_worst(makes, arrays):
    made = arrays.images([0, 1, 1], [0, 1, 0], classes=2, loss=[0.1, np.nan, 9.0], confidence=[0.9, np.nan, 0.5])
    made["top5"][1] = -1
    run = makes.images([made], 2)
    found = judgements_of(run, 1)
    assert (found.n, found.not_finite, found.matrix.sum()) == (3, 1, 2)
    assert found.matrix.tolist() == [[1, 0], [1, 0]]
    assert [(c.name, c.n, c.right) for c in found.classes] == [("thing 1", 2, 0), ("thing 0", 1, 1)]
    assert (found.worst[0].name, found.worst[0].predicted, found.worst[0].right) == ("val_1.JPEG", "not finite", False)
    page = page_of(run)
    assert "the output is not finite, they count as wrong" in page
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S)


def test_few_classes_are_a_table_and_many_a_heat_map(makes):
    few, many = makes.random_images(300, 8, 1), makes.random_images(3000, 200, 1, name="many")
    page = page_of(few)
    assert 'class="confusion"' in page
    assert 'id="fig-confusion"' not in page
    assert (
        len(re.findall(r'<td class="n[^"]*"[^>]*>\d+</td>', page.split('class="confusion"')[1].split("</table>")[0]))
        == 64
    )
    page = page_of(many)
    assert 'class="confusion"' not in page
    assert page.count('<figcaption id="fig-confusion">') == 1
    assert len(judgements_of(many, 1).pairs) == PAIRS
    assert len(judgements_of(many, 1).worst) == WORST
    assert len(page) < 1_000_000


def test_the_best_epoch_is_judged(makes, arrays):
    right, wrong = (arrays.images([0, 1], first, classes=2) for first in ([0, 1], [1, 0]))
    assert "as judged after epoch 2" in page_of(makes.images([wrong, right, wrong], 2))


def test_pictures_where_the_data_is_at_hand(makes, arrays):
    config = DataConfig(max_val_samples=40)
    val = open_data(config).val
    classes = len(open_data(config).classes)
    made = arrays.images(val.labels, (val.labels + 1) % classes, classes=classes, loss=np.arange(40.0))
    described = {"names": list(val.names), "config": {"data": {"max_val_samples": 40}}}
    page = page_of(makes.images([made], classes, data_sha=val.sha, **described))
    assert page.count("data:image/webp;base64,") == WORST
    assert "Without pictures" not in page
    page = page_of(makes.images([made], classes, data_sha="0" * 64, name="other", **described))
    assert "data:image/webp" not in page
    assert "Without pictures: the data in the run&#39;s data.root are not those that were judged." in page


@pytest.mark.parametrize("damage", ["predictions", "classes", "names"])
def test_without_judgements_the_page_says_why(makes, arrays, damage):
    run = makes.images([arrays.images([0, 1], [0, 0], classes=2)], 2)
    data = run.data()
    if damage == "predictions":
        run.predictions_path(1).unlink()
    elif damage == "classes":
        run.write("data.json", json.dumps({**data, "classes": data["classes"][:1]}))
    else:
        run.write("data.json", json.dumps({**data, "val_names": ["one"]}))
    page = page_of(run)
    assert "The judgements cannot be shown: " in page
    assert ("cannot be read" if damage == "predictions" else "does not fit the predictions") in page
    assert 'id="fig-curves"' in page


def test_names_are_escaped(makes):
    run = makes.random_images(60, 3, 1, words=[HOSTILE, "\x1b[2J", "c"], names=[HOSTILE + str(i) for i in range(60)])
    page = page_of(run)
    assert HOSTILE not in page
    assert "\x1b" not in page


# ---------------------------------------------------------------------- language


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A trained language model, and its folder."""
    folder = tmp_path_factory.mktemp("words")
    tree = {
        "workload": "language_model", "storage_path": str(folder / "runs"), "batch_size": 4, "shards": 2, "lr": 1.0,
        "data": {"name": "python_docs", "max_train_tokens": 1500, "max_val_tokens": 600, "bptt": 20},
        "model": {"name": "lstm", "emsize": 8, "nhid": 8, "nlayers": 1, "dropout": 0},
    }  # fmt: skip
    return train(parse(tree, ExperimentConfig, "test"), argv=[])


def invoke(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_language_model_has_its_test_text_and_writes(words):
    told = json.loads(invoke("report", words.root, "--json"))
    page = (words.root / "report.html").read_text()
    judged = json.loads(invoke("evaluate", f"{words.root}@best", "--json"))
    assert told["test"] == {"test_loss": judged["test_loss"], "test_ppl": judged["test_ppl"]}
    assert f"<strong>{judged['test_ppl']:.2f}</strong>" in page
    written = invoke("generate", f"{words.root}@best", "--words", WORDS)
    assert told["text"] == written
    assert len(told["text"].split()) > WORDS / 2
    shown = re.search(r'<blockquote class="sample">(.*?)</blockquote>', page, re.S)
    assert shown is not None
    assert shown[1].split()[0] in written
    assert "confusion" not in page.split("</style>")[1]
    assert json.loads(invoke("report", words.root, "--json"))["text"] == told["text"]


def test_without_checkpoint_and_data_the_page_is_there(words, tmp_path):
    import shutil

    copied = type(words)(shutil.copytree(words.root, tmp_path / words.id))
    shutil.rmtree(copied.checkpoint(1))
    invoke("report", copied.root)
    page = (copied.root / "report.html").read_text()
    assert "The test text was not evaluated: " in page
    assert "It could not write: " in page
    assert "has no checkpoint" in page
    assert 'id="fig-steps"' in page


# ---------------------------------------------------------------------- the verdict


def epoch(number, train_loss, val_loss, acc1):
    return EpochRecord(number, number, train_loss, val_loss, {"acc1": acc1}, 0.1, 1.0, {"total": 1.0}, "a")


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([epoch(1, 2.0, 2.0, 30.0)], "Epoch 1 is the best: acc1 30 %, validation loss 2."),
        (
            [epoch(1, 2.0, 2.0, 30.0), epoch(2, 1.0, 1.5, 48.73)],
            "Epoch 2 is the best: acc1 48.73 %, validation loss 1.5. It is also the last: more epochs may be better "
            "still.",
        ),
        (
            [epoch(1, 2.0, 2.0, 30.0), epoch(2, 1.0, 2.5, 29.0), epoch(3, 0.5, 3.0, 28.0)],
            "Epoch 1 is the best: acc1 30 %, validation loss 2. From there to epoch 3 the training loss fell from 2 to "
            "0.5 and the validation loss rose from 2 to 3, a sign of overfitting.",
        ),
        (
            [epoch(1, 2.0, 2.0, 30.0), epoch(2, 2.1, 2.5, 29.0)],
            "Epoch 1 is the best: acc1 30 %, validation loss 2. No later epoch is better, up to the last (2).",
        ),
        (
            [epoch(1, 2.0, 2.0, 30.0), epoch(2, 1.0, math.nan, 1.0)],
            "Epoch 1 is the best: acc1 30 %, validation loss 2. The last epoch (2) is not finite.",
        ),
        ([epoch(1, 2.0, math.nan, 1.0)], "No epoch of 1 has a finite validation loss, so there is no best one."),
    ],
)
def test_the_verdict(records, said):
    assert lead(records, best(records, {"acc1": "max"})) == said


def test_the_verdict_stands_before_the_pictures_and_these_before_the_figures(makes):
    page = page_of(makes.random_images(100, 4, 2))
    order = [page.index(f'class="{name}"') for name in ("lead", "plot", "cards")]
    assert order == sorted(order)
