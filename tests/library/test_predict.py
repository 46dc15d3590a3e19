"""`rayexp predict`, `rayexp export` and their like in Python, against what training stored."""

from __future__ import annotations

import csv
import json
import math
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.testing
from PIL import Image

import rayexp
from rayexp.cli import app
from rayexp.config import ExperimentConfig, parse
from rayexp.data.shapes import home
from rayexp.data.text import EOS
from rayexp.errors import UserError
from rayexp.launch.predict import lines, picture
from rayexp.launch.predict import pictures as found_pictures
from rayexp.runs.run import Run
from rayexp.workloads import open_workload
from rayexp.workloads.language_model import generate
from rayexp.workloads.language_model.model import build
from rayexp.workloads.language_model.plain import plain
from rayexp.workloads.language_model.score import score

Command = Callable[..., typer.testing.Result]


@pytest.fixture
def call(runs: Path, pictures: Run, words: Run) -> Command:
    """`rayexp ... --runs RUNS` in this process; an error is raised."""

    def run(*args: Any) -> typer.testing.Result:
        words = [*map(str, args), "--runs", str(runs)]
        done = typer.testing.CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=True)
        if isinstance(done.exception, UserError):
            raise done.exception
        return done

    return run


@pytest.fixture
def jpegs(pictures: Run, tmp_path: Path) -> list[Path]:
    """The files of the validation images, in their order."""
    names = pictures.data()["val_names"]
    with zipfile.ZipFile(home() / "shapes.zip") as archive:
        inside = {Path(name).name: name for name in archive.namelist() if "/val/images/" in name}
        for name in names:
            (tmp_path / name).write_bytes(archive.read(inside[name]))
    return [tmp_path / name for name in names]


def test_validation_files_get_the_predictions_that_training_stored(pictures: Run, jpegs: list[Path]) -> None:
    stored = pictures.predictions(2)
    answers = rayexp.predict(pictures, jpegs)
    assert [row.classes for row in answers] == [tuple(row) for row in stored["top5"].tolist()]
    assert [np.float32(row.confidences[0]) for row in answers] == stored["confidence"].tolist()
    for row in answers:
        assert list(row.confidences) == sorted(row.confidences, reverse=True)
        assert 0 < sum(row.confidences) <= 1.0001


def test_pixels_are_those_that_were_packed(pictures: Run, jpegs: list[Path]) -> None:
    workload: Any = open_workload(pictures.config())
    packed = workload.data.val.read(np.arange(len(jpegs)))
    for path, pixels in zip(jpegs, packed, strict=True):
        np.testing.assert_array_equal(picture(path, 32), pixels)
        np.testing.assert_array_equal(picture(Image.open(path), 32), pixels)
        np.testing.assert_array_equal(picture(np.asarray(Image.open(path).convert("RGB")), 32), pixels)


def test_the_command_names_classes_and_writes_what_it_says(call: Command, pictures: Run, jpegs: list[Path]) -> None:
    table = jpegs[0].parent / "answers.csv"
    shown = call("predict", "pictures@2", *jpegs[:3], "--csv", table, "--top", 2)
    assert shown.exit_code == 0
    answers = rayexp.predict(pictures, jpegs[:3], top=2)
    for row in answers:
        assert row.name in shown.stdout
        assert f"{answers.words(row.classes[0])} {100 * row.confidences[0]:.1f} %" in shown.stdout
    rows = list(csv.DictReader(table.open()))
    assert [(row["name"], row["rank"]) for row in rows] == [(str(path), rank) for path in jpegs[:3] for rank in "12"]
    first = pictures.data()["classes"][answers.rows[0].classes[0]]
    assert [rows[0]["id"], rows[0]["words"]] == first
    told = json.loads(call("predict", "pictures@2", *jpegs[:3], "--top", 2, "--json").stdout)
    assert told == {**answers.to_dict(), "unreadable": []}
    assert told["rows"][0]["top"][0]["words"] == first[1]


def test_what_cannot_be_read_is_named_and_left_out(call: Command, jpegs: list[Path]) -> None:
    folder = jpegs[0].parent
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    shown = call("predict", "pictures@2", folder, "--json")
    assert shown.exit_code == 1
    told = json.loads(shown.stdout)
    assert [row["name"] for row in told["rows"]] == [str(path) for path in jpegs]
    assert [bad["name"] for bad in told["unreadable"]] == [str(folder / "broken.png")]
    alone = call("predict", "pictures@2", folder / "broken.png")
    assert (alone.exit_code, alone.stdout) == (1, "")
    why = f"{folder / 'broken.png'}: left out, it cannot be read (no image format that is known here)"
    assert why in shown.stderr.splitlines()


def test_folders_give_their_pictures_by_number(tmp_path: Path) -> None:
    for name in ("val_10.JPEG", "val_9.jpeg", "deep/a.png", ".hidden/b.png", ".c.png", "notes.txt"):
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = [path.relative_to(tmp_path / "in").as_posix() for _, path in found_pictures([tmp_path / "in"])]
    assert found == ["deep/a.png", "val_9.jpeg", "val_10.JPEG"]
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        found_pictures([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no picture \(jpg, jpeg, png"):
        found_pictures([tmp_path / "empty"])


def test_what_is_not_finite_has_no_class(pictures: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from rayexp.workloads.image_classification import classify

    ranked = classify.ranked
    monkeypatch.setattr(classify, "ranked", lambda logits, count: ranked(logits * torch.nan, count))
    (row,) = rayexp.predict(pictures, np.zeros((4, 4), np.uint8))
    assert (row.classes, row.confidences) == ((), ())
    assert rayexp.predict(pictures, np.zeros((4, 4), np.uint8)).to_dict()["rows"] == [{"name": "0", "top": []}]


# ---------------------------------------------------------------------- lines of text


def test_a_line_costs_what_its_words_cost_one_by_one(words: Run) -> None:
    """Each word's loss is minus the logarithm of the share that the model gave it."""
    import torch

    line = "The module is zzzz a"
    (row,) = rayexp.predict(words, line)
    writer = generate.open_generator(words, 1)
    numbers, unknown = generate.read_prompt(line, writer)
    assert row.unknown == tuple(unknown)
    assert "zzzz" in row.unknown
    end = writer.vocabulary.index(EOS)
    total, state = 0.0, writer.net.body.begin(1, torch.device("cpu"))
    for now, after in zip([end, *numbers], [*numbers, end], strict=True):
        with torch.inference_mode():
            logits, state = writer.net.advance(torch.tensor([[now]]), state)
        total -= float(torch.log_softmax(logits[0].double(), 0)[after])
    assert row.tokens == len(numbers) + 1
    assert row.loss == pytest.approx(total / row.tokens, rel=1e-4)
    assert row.ppl == pytest.approx(math.exp(row.loss))


@pytest.mark.parametrize("context", [0, 3])
def test_a_transformer_reads_windows_as_in_validation(context: int) -> None:
    import torch

    tree = {
        "workload": "language_model",
        "data": {"name": "text", "root": "x", "bptt": 4},
        "model": {"name": "transformer", "emsize": 8, "nhid": 8, "nlayers": 1, "nhead": 2, "context": context},
    }
    config = parse(tree, ExperimentConfig, "test")
    words = (EOS, *"abcdefghij")
    net = build(config, len(words)).eval()
    found = score(plain(net) if context == 0 else lambda tokens: net(tokens)[0], words, config, "a b c d e f g h i j")
    read = torch.tensor([0, *range(1, 11), 0])
    total = 0.0
    for at in range(11):  # word by word, with what its window and the context before it hold
        start = max(0, at // 4 * 4 - context)
        with torch.inference_mode():
            logits = net(read[start : at + 1, None])[0][-1, 0]
        total -= float(torch.log_softmax(logits.double(), 0)[read[at + 1]])
    assert found.tokens == 11
    assert found.loss == pytest.approx(total / 11, rel=1e-4)


def test_lines_of_files_are_numbered_and_empty_ones_left_out(call: Command, words: Run, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("The module\n\nis a\r\n")
    (tmp_path / "two.txt").write_bytes(b"\xff\xfe")
    shown = call("predict", "words@1", tmp_path, "--json")
    assert shown.exit_code == 1
    told = json.loads(shown.stdout)
    assert [(row["name"], row["text"]) for row in told["rows"]] == [
        (f"{tmp_path / 'one.txt'}:1", "The module"),
        (f"{tmp_path / 'one.txt'}:3", "is a"),
    ]
    assert told["unreadable"] == [{"name": str(tmp_path / "two.txt"), "why": "not UTF-8 (byte 0xff at offset 0)"}]
    shown = call("predict", "words@1", tmp_path / "one.txt", "--csv", tmp_path / "table.csv")
    assert shown.exit_code == 0
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    tokens = sum(int(row["tokens"]) for row in rows)
    loss = sum(int(row["tokens"]) * float(row["loss"]) for row in rows) / tokens
    assert f"all: {tokens} tokens" in shown.stdout
    assert f"loss {loss:.4f}, ppl {math.exp(loss):.2f}" in shown.stdout
    with pytest.raises(UserError, match=r"holds no \*.txt"):
        lines([shutil.copytree(words.logs, tmp_path / "logs")])


def test_a_text_of_several_lines_is_refused(words: Run) -> None:
    with pytest.raises(UserError, match="a text of several lines"):
        rayexp.predict(words, "one\ntwo")


def test_generate_is_what_the_command_prints(call: Command, words: Run) -> None:
    said = call("generate", "words@1", "--words", "12", "--seed", "3", "--prompt", "The module").stdout
    assert rayexp.generate(words, 12, seed=3, prompt="The module") == said


def test_export_prints_what_is_needed(call: Command, tmp_path: Path) -> None:
    shown = call("export", "pictures@1", "--to", tmp_path / "model.pt")
    assert shown.stdout == f"{tmp_path / 'model.pt'}\n"
    said = " ".join(shown.stderr.split())
    for part in ("mean: 0.485, 0.456, 0.406", "std: 0.229, 0.224, 0.225", "model = resnet18(num_classes=20)"):
        assert part in said
    assert "model.load_state_dict(torch.load(FILE, weights_only=True))" in said
    told = json.loads(call("export", "words@1", "--to", tmp_path / "words.safetensors", "--json").stdout)
    assert told["architecture"] == "lstm"
    assert told["path"] == str(tmp_path / "words.safetensors")
