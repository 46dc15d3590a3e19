from __future__ import annotations

import functools
import importlib
import json
import re
import sys

import pytest

from rayexp.cli import data
from rayexp.data import DATASETS


@pytest.fixture
def rayexp(typed, cache):
    """Run `rayexp data ...` in an empty folder."""
    return functools.partial(typed, "data")


def test_fetch_and_info(rayexp, tmp_path, tiny):
    source = tiny.write_zip(tmp_path / "a.zip", tiny.layout())
    first = rayexp("fetch", "tiny_imagenet", "--from", source)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.startswith("packed: 20 train and 9 val images of 3 classes in data/tiny_imagenet")
    second = rayexp("fetch", "tiny_imagenet", "--from", source, "--to", "data/tiny_imagenet")
    assert second.stdout.startswith("already there: 20 train and 9 val images")
    by_name, by_folder = (rayexp("info", what, "--json") for what in ("tiny_imagenet", tmp_path / "data/tiny_imagenet"))
    summary, other = json.loads(by_name.stdout), json.loads(by_folder.stdout)
    assert {**summary, "root": ""} == {**other, "root": ""}
    assert (summary["kind"], summary["train"], summary["val"], summary["image_size"]) == ("images", 20, 9, 64)
    assert summary["classes"][0] == {
        "label": 0, "id": "n01000001", "words": "goldfish, Carassius auratus", "train": 4, "val": 3,
    }  # fmt: skip
    shown = rayexp("info", "tiny_imagenet", "--check")
    assert re.search(r"goldfish.*\b4\b.*\b3\b", shown.stdout)
    assert summary["sha"]["train"] in shown.stdout
    assert "every hash is as it should be" in shown.stdout


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_long_line_is_wrapped_between_words(monkeypatch, columns):
    layout = "2 classes; train from train/; val: a fifth of each class, held out; test/ set aside; 3 images left out"
    monkeypatch.setenv("COLUMNS", str(columns))
    assert data._field("layout", layout) == f"  layout       {layout}"  # in a pipe, a line is a line
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = data._field("layout", layout).splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= columns
    assert " ".join(line.strip() for line in lines).split() == ["layout", *layout.split()]


def test_fetch_alone_lists_what_there_is(rayexp):
    alone = rayexp("fetch")
    assert (alone.returncode, alone.stderr) == (0, "")
    fetched = [name for name, module in DATASETS.items() if hasattr(importlib.import_module(module), "fetch")]
    listed = [line.split()[0] for line in alone.stdout.splitlines()]
    assert sorted(listed[: len(fetched)]) == sorted(fetched)
    assert all(len(line) <= 100 for line in alone.stdout.splitlines())
    assert "data.name=folder" in alone.stdout


def test_the_list_of_what_can_be_fetched_keeps_its_columns(capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "80")
    data._list_fetched()
    lines = capsys.readouterr().out.partition("Nothing to fetch")[0].splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) > len(data.FETCHED)
    assert {line[:15].strip() for line in lines} == {*data.FETCHED, ""}
    assert all(line[14] == " " != line[15] for line in lines)


def test_ten_classes_and_how_many_more(typed, monkeypatch):
    monkeypatch.delenv("RAYEXP_CACHE")  # in this user's cache they may lie packed already
    shown = typed("data", "info", "shapes")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "4,000 train and 1,000 val images of 20 classes" in shown.stdout
    assert "warm_plain_bar" not in shown.stdout
    assert "... and 10 more classes" in shown.stdout
    assert len(json.loads(typed("data", "info", "shapes", "--json").stdout)["classes"]) == 20


def test_info_of_text_and_of_a_plain_folder(rayexp, tmp_path, tiny):
    assert json.loads(rayexp("info", "python_docs", "--json").stdout)["kind"] == "text"
    files = {f"{c}/{k}.png": tiny.picture(k, format="PNG") for c in "ab" for k in range(5)}
    shown = rayexp("info", tiny.write_folder(tmp_path / "own", files))
    assert "8 train and 2 val images of 2 classes" in shown.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("fetch", "tiny_imagnet"), "unknown dataset 'tiny_imagnet' (did you mean tiny_imagenet?); allowed: shapes,"),
        (("fetch", "tiny_imagenet", "--from", "none.zip"), "none.zip: no such file or folder"),
        (("fetch", "wikitext2"), "--from: wikitext2 needs a ZIP, a tar, a folder or a URL"),
        (("fetch", "folder", "--from", "x"), "folder: nothing to fetch"),
        (
            ("info", "shaps"),
            "shaps: no such folder or dataset (did you mean shapes?); allowed: a folder, shapes, tiny_",
        ),
        (("info", __file__), "test_data_command.py is no folder"),
        (("info", "tiny_imagenet"), "tiny_imagenet: not in data/tiny_imagenet"),
        (("info", "."), "no images in class folders"),
    ],
)
def test_wrong_input(rayexp, tmp_path, listing, args, message):
    answer = rayexp(*args)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
    assert answer.stdout == ""
    assert listing(tmp_path) == {}
