"""`rayexp summary` shows a model without its data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rayexp import data as datasets
from rayexp.cli import app
from rayexp.config import ExperimentConfig, parse
from rayexp.data.outline import OUTPUTS, outline
from rayexp.engine.summary import layers
from rayexp.workloads import open_workload


@pytest.fixture
def summary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """`rayexp summary ARGS` in an empty folder, where no data is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*args: str) -> Any:
        return CliRunner().invoke(app, ["summary", *args])

    return run


@pytest.mark.parametrize(
    ("name", "said", "parameters"),
    [
        # torchvision's 11,689,512 with 1000 classes; PyTorch's example prints 13,987,678 for the LSTM.
        ("tiny_imagenet", "data/tiny_imagenet is not there: 200 classes, as tiny_imagenet has", 11_689_512 - 800 * 513),
        ("wikitext2", "data/wikitext2 is not there: 33,278 words, as wikitext2 has", 13_987_678),
        ("quickstart", "", 11_689_512 - 980 * 513),
    ],
)
def test_a_published_dataset_has_a_known_size(
    summary: Callable[..., Any], tmp_path: Path, name: str, said: str, parameters: int
) -> None:
    answer = summary(name, "--json")
    assert answer.exit_code == 0, answer.output
    assert answer.stderr.strip() == said
    assert json.loads(answer.stdout)["total"]["parameters"] == parameters
    assert list(tmp_path.iterdir()) == []  # nothing was drawn or packed


def test_your_own_data_has_the_size_that_you_say(summary: Callable[..., Any], tmp_path: Path) -> None:
    own = ("tiny_imagenet", "data.name=folder", "data.root=none")
    refused = summary(*own)
    assert str(refused.exception).endswith("none is no folder; --classes N shows the model without the data")
    answer = summary(*own, "--classes", "7", "--json")
    assert json.loads(answer.stdout)["total"]["parameters"] == 11_689_512 - 993 * 513
    text = ("wikitext2", "data.name=text", "data.root=none", "model.dropout=0.1")
    assert "--classes N shows" in str(summary(*text).exception)
    # 200 inputs and a bias for each word more or less, and its row of 200 in the embedding.
    answer = summary(*text, "--classes", "1000", "--json")
    assert json.loads(answer.stdout)["total"]["parameters"] == 13_987_678 - 32_278 * 401


def test_data_that_is_there_is_read(summary: Callable[..., Any], tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("one two three\n" * 400)
    answer = summary("wikitext2", "data.name=text", f"data.root={tmp_path}", "--json")
    assert json.loads(answer.stdout)["total"]["parameters"] == 13_987_678 - (33_278 - 5) * 401  # with <eos> and <unk>


@pytest.mark.parametrize("kind", ["shapes", "python_docs"])
def test_a_stand_in_gives_the_layers_of_the_data_itself(kind: str) -> None:
    tree = {"data": {"name": kind}, "batch_size": 16}
    if kind == "python_docs":
        tree |= {"workload": "language_model", "model": {"name": "transformer", "emsize": 32, "nhead": 2, "nlayers": 1}}
    config = parse(tree, ExperimentConfig, "test")
    real = open_workload(config)
    count = OUTPUTS.get(kind) or len(real.data.vocabulary)
    assert layers(open_workload(config, outline(config, count))) == layers(real)


def test_every_name_with_a_known_size_is_a_dataset() -> None:
    assert OUTPUTS.keys() <= datasets.DATASETS.keys()
