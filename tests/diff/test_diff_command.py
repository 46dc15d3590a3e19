"""`rayexp diff` as its users run it: tables, JSON, files, exit codes, errors."""

from __future__ import annotations

import csv
import errno
import json
import subprocess
import sys
import types

import numpy as np
import pytest

from rayexp.cli.diff import _need_predictions

HEAVY = ("torch", "ray", "scipy.stats", "scipy.optimize", "matplotlib", "jinja2", "tensorboardX", "PIL")


@pytest.fixture
def rayexp(typed):
    """Runs the command, which must end with this exit code; returns (stdout, stderr)."""

    def call(*words, code=0):
        done = typed(*words)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    return call


def test_table_and_list(makes, rayexp):
    run = makes.random_images(500, 6, 3)
    out, err = rayexp("diff", f"{run.id}@1", "@last", "--limit", 4)
    assert err == ""
    assert "500 validation images" in out
    assert f"{run.id}@3" in out
    assert "exact McNemar" in out
    assert out.count(".JPEG") == 4
    assert "the first 4 of" in out


def test_json_alone_on_stdout(makes, rayexp, tmp_path):
    run = makes.random_images(300, 5, 2)
    out, err = rayexp(
        "diff", f"{run.root}@1", f"{run.root}@2", "--json", "--csv", "deep/list.csv", "--html", "page.html", "--weights"
    )
    tree = json.loads(out)
    assert tree["n"] == 300
    assert tree["weights"]["tensors"][0]["name"] == "fc.weight"
    assert "list.csv" in err
    assert "page.html" in err
    with (tmp_path / "deep" / "list.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [f["name"] for f in tree["flips"]]
    assert "<!doctype html>" in (tmp_path / "page.html").read_text()


def test_verdicts(makes, arrays, rayexp):
    label = np.zeros(1000, np.int64)

    def right(count):
        return arrays.images(label, (np.arange(1000) >= count).astype(int), classes=2)

    run = makes.images([right(500), right(480), right(600), right(485)], 2)
    ref = run.id
    assert "PASS" in rayexp("diff", f"{ref}@1", "@3", "--max-drop", 0.5)[0]
    assert "FAIL" in rayexp("diff", f"{ref}@3", "@1", "--max-drop", 1, code=1)[0]
    out, _ = rayexp("diff", f"{ref}@1", "@4", "--max-drop", 1.5, "--json", code=3)
    assert json.loads(out)["verdict"] == "INCONCLUSIVE"
    assert "PASS" in rayexp("diff", f"{ref}@1", "@1", "--max-drop", 0.5)[0]


@pytest.mark.parametrize("option", ["--html", "--csv"])
def test_a_page_that_cannot_be_written_is_named(makes, faults, tmp_path, rayexp, option):
    run = makes.random_images(50, 5, 2)
    (tmp_path / "file").touch()
    before = set(tmp_path.rglob("*"))
    _, err = rayexp("diff", f"{run.id}@1", "@2", option, "file/page", code=2)
    assert err == "error: file/page: cannot be written (Not a directory)\n"
    full = [sys.executable, "-m", "rayexp", "diff", f"{run.root}@1", "@2", option, "page"]
    env = faults(fsync=errno.ENOSPC)
    done = subprocess.run(full, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: page: cannot be written (No space left on device); free some space there")
    assert done.stderr.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


def test_same_model_in_one_line(makes, arrays, rayexp):
    a = arrays.images([0, 1], [1, 0], classes=2)
    run = makes.images([a, a], 2, weights=[{"w": np.ones(3, np.float32)}] * 2)
    out, _ = rayexp("diff", f"{run.id}@1", "@2")
    assert out.startswith("these are the same model")
    assert out.count("\n") == 1


def test_all(makes, rayexp, tmp_path):
    run = makes.random_images(300, 5, 4)
    out, _ = rayexp("diff", "--all", run.id, "--html", "churn.html")
    assert "churn between every two epochs" in out
    assert (tmp_path / "churn.html").read_text().count("<rect ") == 16
    tree = json.loads(rayexp("diff", "--all", run.id, "--json")[0])
    assert np.array(tree["churn_matrix"]).shape == (4, 4)


def test_text(makes, arrays, rayexp, tmp_path):
    token = np.random.default_rng(0).integers(0, 4, 3000)
    words = ["<eos>", "[/red]", "<b>", "ü"]
    run = makes.text([arrays.tokens(token, np.full(3000, 2.0) + e * (token - 2)) for e in (0, 1)], words)
    out, _ = rayexp("diff", f"{run.id}@1", "@2", "--html", "text.html", "--max-drop", 1)
    assert "[/red]" in out
    assert "60 blocks" in out
    assert "PASS" in out
    page = (tmp_path / "text.html").read_text()
    assert "&lt;b&gt;" in page


def test_wrong_references(makes, rayexp):
    run = makes.random_images(50, 3, 3)
    for words, expected in [
        ((f"{run.id}@1", "@9"), "no such epoch; there are 1-3"),
        ((f"{run.id}@1", "nothing@2"), "no run 'nothing'"),
        ((f"{run.id}@1", f"{run.id}@first"), "not a checkpoint reference"),
        ((run.id, "1", "2"), f"1: an epoch has its @ before it: {run.id} @1"),
        ((f"{run.id}@1",), "two checkpoints"),
        ((f"{run.id}@1", "@2", "@3", "--tolerance", 1), "which have a rule of their own; it is for samples"),
        ((f"{run.id}@1", "@2", "@2"), "is named twice"),
        ((f"{run.id}@1", "@2", "--tolerance", 1), "--tolerance"),
        ((f"{run.id}@1", "@2", "--slice", "nowhere.csv"), "nowhere.csv cannot be read"),
        ((f"{run.id}@1", "@2", "--baseline", run.id), "two or more runs"),
        (("--all", run.id, "--max-drop", "1"), "--all takes one RUN"),
        ((f"{run.id}@1", "@2", "--max-drop", "-1"), "max-drop"),
        ((f"{run.id}@1", "@2", "--max-drop", "nan"), "max-drop"),
        ((f"{run.id}@1", "@2", "--html", "."), "html"),
        ((f"{run.id}@1", "@2", "--csv", "."), "csv"),
    ]:
        out, err = rayexp("diff", *words, code=2)
        assert out == "", words
        assert err.startswith("error: "), words
        assert err.count("\n") == 1, words
        assert expected in err, words


def test_missing_predictions_are_computed_once(makes, arrays, monkeypatch):
    run = makes.images([arrays.images([0, 1], [1, 0], classes=2)] * 2, 2)
    data = run.predictions_path(2).read_bytes()
    run.predictions_path(2).unlink()
    asked = []

    def predict(run, epoch):
        asked.append(epoch)
        run.predictions_path(epoch).write_bytes(data)

    monkeypatch.setitem(sys.modules, "rayexp.launch.evaluate", types.SimpleNamespace(predict=predict))
    for _ in range(2):
        for epoch in (1, 2):
            _need_predictions(run, epoch)
    assert asked == [2]


def test_a_running_run_can_be_compared(makes, rayexp):
    run = makes.random_images(50, 3, 2)
    run.update(status="running")
    rayexp("diff", f"{run.id}@1", "@2")


def test_nothing_heavy_is_imported(makes, tmp_path):
    run = makes.random_images(200, 5, 2)
    command = [sys.executable, "-X", "importtime", "-m", "rayexp", "diff", f"{run.root}@1", "@2", "--csv", "l.csv"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "rayexp.diff.images" in imported
    assert not imported & set(HEAVY)
