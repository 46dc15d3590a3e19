"""Tables at the width of a terminal: columns go, texts are wrapped, and no word is cut."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayexp.cli import _output
from rayexp.cli._output import print_table, tell
from rayexp.cli._table import GAP, table

WORD = st.text("abcdefghij-_/.", min_size=1, max_size=30)
TEXT = st.lists(WORD, min_size=1, max_size=12).map(" ".join)
RUN = "20261124T072119Z-tiny_imagenet-6766"


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, str]]:
    columns = draw(st.lists(st.sampled_from([WORD, TEXT]), min_size=1, max_size=6))
    count = draw(st.integers(1, 4))
    return [{f"c{i}": draw(cells) for i, cells in enumerate(columns)} for _ in range(count)]


@given(rows(), st.integers(20, 120), st.integers(0, 6))
def test_no_word_is_cut_at_any_width(rows: list[dict[str, str]], width: int, droppable: int) -> None:
    names = list(rows[0])
    text, dropped = table(rows, names[1 : 1 + droppable], width)
    lines = text.splitlines()
    shown = [name for name in names if name not in dropped]
    words = [word for name in shown for row in rows for word in row[name].split()]
    found = text.split()
    assert all(found.count(word) >= words.count(word) for word in words)
    # A line is too long only where the words that must stand side by side are.
    longest = sum(max(len(word) for row in rows for word in [name, *row[name].split()]) for name in shown)
    assert max(map(len, lines)) <= max(width, longest + GAP * len(shown) + 2)
    assert lines == [line.rstrip() for line in lines]


@given(rows())
def test_without_a_terminal_every_row_is_one_line(rows: list[dict[str, str]]) -> None:
    text, dropped = table(rows, list(rows[0]), None)
    assert dropped == []
    body = text.split("─\n")[-1].strip("\n").splitlines()
    assert [line.split() for line in body] == [" ".join(row.values()).split() for row in rows]


def test_columns_go_in_their_order_and_only_as_many_as_must() -> None:
    row = {"run": RUN, "status": "done", "workload": "image_classification", "device": "cpu", "weights": "0f3a1234"}
    drop = ("workload", "device", "status")
    assert table([row], drop, 100)[1] == []
    assert table([row], drop, 80)[1] == ["workload"]
    assert table([row], drop, 59)[1] == ["workload", "device"]
    assert table([row], drop, 20)[1] == list(drop)
    for width in (20, 59, 80, 100):
        assert f" {RUN}  " in table([row], drop, width)[0]


def test_a_text_is_wrapped_and_no_column_goes_for_it() -> None:
    row = {"cell": "gpu-x8", "where": "gpu x 8", "plan": "skipped: 8 GPUs asked, this machine has 0 of them at present"}
    text, dropped = table([row], ("where",), 60)
    assert dropped == []
    assert max(map(len, text.splitlines())) <= 60
    assert table([row], ("where",), 40)[1] == ["where"]


def test_texts_share_the_loss() -> None:
    text, _ = table([{"class": "circle, plain, cold", "A": "circle, plain, cold", "B": "circle, plain, cold"}], (), 54)
    assert text.count("circle, plain,") == 3
    assert max(map(len, text.splitlines())) <= 54


def test_a_longer_path_stands_whole_on_a_line_of_its_own() -> None:
    path = "/".join(["folder"] * 20)
    text, _ = table([{"what": "disk", "found": f"9 GB free for {path} and what is below it"}], (), 60)
    assert [line for line in text.splitlines() if path in line] == [f"       {path}"]
    assert all(len(line) <= 60 for line in text.splitlines() if path not in line)


def test_what_was_left_out_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_output, "terminal_width", lambda stream: 40)
    print_table([{"run": RUN, "workers": 2}], drop=("workers",))
    out, err = capsys.readouterr()
    assert RUN in out
    assert "workers" not in out
    assert " ".join(err.split()) == "left out at 40 columns (--json has all): workers"


def test_only_a_terminal_has_a_width(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"error: {RUN}: the run is at it, and says so in a rather long line"
    monkeypatch.setenv("COLUMNS", "40")
    assert _output.terminal_width(sys.stdout) is None
    tell(line)
    assert capsys.readouterr().out == f"{line}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert _output.terminal_width(sys.stdout) == 40
    tell(line)
    assert capsys.readouterr().out == f"error:\n{RUN}: the\nrun is at it, and says so in a rather\nlong line\n"


def test_a_truth_is_a_word() -> None:
    drawn, _ = table([{"workers": "0", "equal": True}, {"workers": "1", "equal": False}], drop=(), width=None)
    assert [line.split() for line in drawn.splitlines()[-2:]] == [["0", "yes"], ["1", "no"]]
