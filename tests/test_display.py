"""How what we did not choose is shown: terminals, cells, figures, JSON."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayexp.display import breadth, counted, csv_cell, figure, folded, plain, printable, short, short_names, tied


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("\x1b]0;x\x07\x1b[2J") == "\\x1b]0;x\\x07\\x1b[2J"
    assert printable("a\r\nb\tc\x7f\x85\x9b") == "a\\x0d\\x0ab\\x09c\\x7f\\x85\\x9b"
    assert printable("\u2028\u2029\u202egnp.exe\u2066") == "\\u2028\\u2029\\u202egnp.exe\\u2066"
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_what_people_write_stays():
    for text in ("plain", "Ägypten", "猫", "می‌خواهم", "👩‍🔬", "a\u00a0b", "[red]x[/red]", "back\\slash"):
        assert printable(text) == text


def test_a_name_that_is_no_utf8_shows_its_bytes():
    name = os.fsdecode(b"caf\xe9.png")
    assert printable(name) == "caf\\xe9.png"
    assert printable("\ud800") == "\\ud800"


@given(st.text(st.characters(codec=None, categories=None)))
def test_anything_is_printable(text):
    shown = printable(text)
    shown.encode()
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    assert printable(shown) == shown


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"])
def test_no_cell_is_a_formula(start):
    """https://owasp.org/www-community/attacks/CSV_Injection"""
    cell = csv_cell(start + 'cmd|"/C calc"!A0')
    assert cell[0] == "'"
    out = io.StringIO()
    csv.writer(out).writerow([cell, "next"])
    assert next(csv.reader(io.StringIO(out.getvalue()))) == [cell, "next"]


def test_other_cells_stay():
    for text in ("", "goldfish, Carassius auratus", "a=b", "'quoted", "1-2"):
        assert csv_cell(text) == text


def test_figures():
    assert figure(None) == ""
    assert [figure(x, ".2f") for x in (math.nan, math.inf, -math.inf)] == ["not finite"] * 3
    assert figure(1e300, ".2f") == "1e+300"
    assert figure(-2e6, ".2f") == "-2e+06"
    assert figure(123.456, ".2f") == "123.46"
    assert figure(1e7, ".4e") == "1.0000e+07"


def test_a_figure_below_a_million_has_no_exponent():
    assert [figure(x, ",.4g") for x in (18612.34, 9999.6, 9999.4, -1e5)] == [
        "18,612",
        "10,000",
        "9,999",
        "-100,000",
    ]
    assert [figure(x, "+.3g") for x in (1234.0, -1234.0, 12.34)] == ["+1,234", "-1,234", "+12.3"]
    assert [figure(x) for x in (999999.0, 1e6, 1e16, 1e-5)] == ["999,999", "1e+06", "1e+16", "1e-05"]
    assert figure(20000.0, ".2e") == "2.00e+04"


def test_json_is_strict_whatever_comes():
    value = {1: (np.float32("nan"), np.int64(3), [math.inf, 1.5]), "a": np.array([[1.0, -math.inf]]), "b": True}
    assert plain(value) == {"1": [None, 3, [None, 1.5]], "a": [[1.0, None]], "b": True}
    json.dumps(plain(value), allow_nan=False)


def test_a_number_with_its_noun():
    assert [counted(n, "worker") for n in (0, 1, 2, 1200)] == ["0 workers", "1 worker", "2 workers", "1,200 workers"]
    assert [counted(x, "core") for x in (0.5, 1.0, 8.0)] == ["0.5 cores", "1 core", "8 cores"]
    assert [counted(n, "class", "classes") for n in (1, 200)] == ["1 class", "200 classes"]


def test_hashes_are_short():
    assert short("0f3a1234" * 8) == "0f3a1234"
    assert short("") == ""


WORDS = st.lists(st.text("abc-_./猫", min_size=1, max_size=30), min_size=1, max_size=30)


@given(WORDS, st.integers(1, 100), st.sampled_from(["", "  "]))
def test_lines_are_folded_between_words(words, width, indent):
    lines = folded(indent + " ".join(words), width).split("\n")
    assert " ".join(lines).split() == words
    assert all(breadth(line) <= width or len(line.split()) == 1 for line in lines)
    assert all(line.startswith(indent) for line in lines)
    for line, after in itertools.pairwise(lines):  # no line ends early
        assert breadth(line) + 1 + breadth(after.split()[0]) > width


def test_commands_and_short_lines_stay_as_they_are():
    for line in ("$ rayexp train  a b c", "go on with: rayexp train --resume a", "a  b"):
        assert folded(line, max(4, len(line) - 30)) == line
    assert folded("a b c\nd e f", 3) == "a b\nc\nd e\nf"
    assert folded("a b c", None) == "a b c"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("62 % of 3.5 GB in 12 min 5 s", "62~% of 3.5~GB in 12~min 5~s"),
        ("-1.76 points, 0.4 to 0.9 s", "-1.76~points, 0.4 to 0.9~s"),
        ("1 GB/s and 9 Gbit/s, 40 us", "1~GB/s and 9~Gbit/s, 40~us"),
        ("(62 %) 62 %.", "(62~%) 62~%."),
        ("2 seeds, 4 sheep, 3 halves, a %, 5 x 5", "2 seeds, 4 sheep, 3 halves, a %, 5~x 5"),
        ("2 cores and 1,200 images", "2 cores and 1,200 images"),
    ],
)
def test_a_number_and_its_unit_stand_on_one_line(text: str, expected: str) -> None:
    assert tied(text) == expected.replace("~", "\u00a0")
    assert tied(tied(text)) == tied(text)


def test_short_names():
    classes = (
        ("n1", "crane, bird"),
        ("n2", "crane, machine"),
        ("n3", "owl, bird"),
        ("n4", ""),
        ("n5", "x"),
        ("n6", "x"),
    )
    assert short_names(classes) == ("crane, bird", "crane, machine", "owl", "n4", "x (n5)", "x (n6)")
