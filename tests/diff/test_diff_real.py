"""Trained for real: two epochs of one run, and two runs of 1 and 2 workers, recomputed from the files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def rayexp(folder, *words):
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "rayexp", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=550, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(folder, config, *words):
    """The run directory that this training made."""
    before = set(folder.glob("runs/*"))
    rayexp(folder, "train", REPOSITORY / "configs" / config, *words, "--runs", folder / "runs")
    (made,) = set(folder.glob("runs/*")) - before
    return made


def stored(run, epoch):
    with np.load(run / "predictions" / f"epoch_{epoch:03d}.npz") as npz:
        return {name: npz[name] for name in npz.files}


def check_images(folder, first, second):
    """`diff --json` of two checkpoints (run, epoch) against plain counting."""
    refs = [f"{run}@{epoch}" for run, epoch in (first, second)]
    tree = json.loads(rayexp(folder, "diff", *refs, "--json", "--html", "page.html"))
    a, b = stored(*first), stored(*second)
    label, p, q = a["label"].tolist(), a["top5"][:, 0].tolist(), b["top5"][:, 0].tolist()
    rows = list(zip(label, p, q, strict=True))
    gained = sum(x != y == z for y, x, z in rows)
    lost = sum(x == y != z for y, x, z in rows)
    assert (tree["n"], tree["gained"], tree["lost"]) == (len(rows), gained, lost)
    assert tree["churn"] == sum(x != z for _, x, z in rows) == len(tree["flips"])
    assert tree["acc1"]["b"] == pytest.approx(100 * sum(y == z for y, _, z in rows) / len(rows))
    assert tree["acc5"]["a"] == pytest.approx(
        100 * sum(y in top for y, top in zip(label, a["top5"].tolist(), strict=True)) / len(rows)
    )
    p_value = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert tree["mcnemar_p"] == pytest.approx(p_value, rel=1e-9)
    names = json.loads((first[0] / "data.json").read_text())["val_names"]
    assert {f["name"]: (f["a"]["index"], f["b"]["index"]) for f in tree["flips"]} == {
        names[i]: (x, z) for i, (_, x, z) in enumerate(rows) if x != z
    }
    page = (folder / "page.html").read_text()
    assert "The pictures are not at hand" not in page
    return tree


@pytest.mark.parametrize("data", ["shapes", "tiny_imagenet"])
def test_two_epochs_of_one_run(tmp_path, data):
    words = ["data.max_train_samples=256", "epochs=2", "batch_size=64"]
    if data == "tiny_imagenet":
        source = os.environ.get("RAYEXP_TEST_DATA")
        if not source:
            pytest.skip("RAYEXP_TEST_DATA is not set")
        rayexp(
            tmp_path, "data", "fetch", data, "--from", Path(source) / "tiny-imagenet-200-first80.zip", "--to", "packed"
        )
        words += [f"data.name={data}", "data.root=packed", "data.max_val_samples=1000"]
    run = train(tmp_path, "quickstart.yaml", *words)
    tree = check_images(tmp_path, (run, 1), (run, 2))
    records = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    assert [r["acc1"] for r in records] == pytest.approx([tree["acc1"]["a"], tree["acc1"]["b"]])
    assert [r["val_loss"] for r in records] == pytest.approx([tree["loss"]["a"], tree["loss"]["b"]])
    # predictions that are missing are computed on the way, and are those that training had made
    before = (run / "predictions" / "epoch_001.npz").read_bytes()
    (run / "predictions" / "epoch_001.npz").unlink()
    assert check_images_again(tmp_path, run) == tree
    assert (run / "predictions" / "epoch_001.npz").read_bytes() == before


def check_images_again(folder, run):
    return json.loads(rayexp(folder, "diff", f"{run}@1", f"{run}@2", "--json"))


@pytest.mark.ray
def test_one_worker_and_two_workers(tmp_path):
    words = ["data.max_train_samples=256", "data.max_val_samples=300", "epochs=1", "batch_size=64", "reduction=ddp"]
    runs = [train(tmp_path, "quickstart.yaml", *words, f"scaling.num_workers={n}") for n in (1, 2)]
    tree = check_images(tmp_path, (runs[0], 1), (runs[1], 1))
    assert tree["config_changes"] == [{"key": "scaling.num_workers", "a": 1, "b": 2}]


def test_two_epochs_of_a_language_model(tmp_path):
    words = ["data.name=python_docs", "data.root=null", "data.max_train_tokens=8000", "data.max_val_tokens=6000"]
    run = train(tmp_path, "wikitext2.yaml", *words, "epochs=2", "model.emsize=32", "model.nhid=32")
    tree = json.loads(rayexp(tmp_path, "diff", f"{run}@1", f"{run}@2", "--json", "--weights", "--html", "page.html"))
    a, b = stored(run, 1)["loss"].astype(float), stored(run, 2)["loss"].astype(float)
    assert tree["n"] == len(a)
    assert tree["ppl"] == pytest.approx({"a": np.exp(a.mean()), "b": np.exp(b.mean())})
    records = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    assert [r["ppl"] for r in records] == pytest.approx([tree["ppl"]["a"], tree["ppl"]["b"]], rel=1e-6)
    assert tree["gained"] == int((b - a < -np.log(2)).sum())
    assert not tree["weights"]["equal"]
    assert tree["ratio_interval"][0] <= tree["ratio"] <= tree["ratio_interval"][1]
