"""What all commands share: tables, lines and JSON."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from rich.console import Console

from rayexp.cli import _app
from rayexp.cli._output import error_line, print_json, print_table, say, tell
from rayexp.errors import UserError
from rayexp.launch.screen import Screen, epoch_line
from rayexp.runs.records import EpochRecord
from rayexp.runs.run import Run

EVIL = "\x1b]0;x\x07\x1b[2J[red]caf\udce9[/red]"
SHOWN = "\\x1b]0;x\\x07\\x1b[2J[red]caf\\xe9[/red]"


def test_tables_show_foreign_names_escaped(capsys):
    print_table([{"class": EVIL, EVIL: 1}], EVIL)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count(SHOWN) == 3


def test_lines_show_foreign_names_escaped(capsys):
    tell(f"one\n{EVIL}")
    say(f"two\n{EVIL}")
    error_line(f"three {EVIL}")
    out, err = capsys.readouterr()
    assert out == f"one\n{SHOWN}\n"
    assert err == f"two\n{SHOWN}\nerror: three {SHOWN}\n"


@pytest.mark.parametrize(
    ("environment", "red"),
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_an_error_is_red_only_where_a_terminal_may_show_it_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], red: bool
) -> None:
    for name, value in {"TERM": "xterm", "NO_COLOR": "", **environment}.items():
        monkeypatch.setenv(name, value)
    error_line("lost")
    assert capsys.readouterr().err == "error: lost\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    error_line("lost")
    assert capsys.readouterr().err == ("\x1b[31merror: lost\x1b[0m\n" if red else "error: lost\n")


def test_errors_name_a_file_that_is_no_utf8(capsys, monkeypatch):
    def fail(**_):
        raise UserError(f"{EVIL}: not an image")

    monkeypatch.setattr(_app, "app", fail)
    with pytest.raises(SystemExit) as end:
        _app.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {SHOWN}: not an image\n"


def test_the_screen_shows_foreign_names_escaped(tmp_path, capsys):
    screen = Screen(Run(tmp_path), Console(width=200))
    screen.say(EVIL)
    assert capsys.readouterr().out == f"{SHOWN}\n"


def test_an_epoch_that_is_not_finite_says_so():
    record = EpochRecord(1, 1, math.nan, math.inf, {"ppl": 1e300}, 0.1, 5.0, {"total": 1.0}, "a" * 64)
    line = epoch_line(record)
    assert "train_loss not finite  val_loss not finite  ppl 1e+300" in line


def test_json_is_strict(capsys):
    print_json({"a": math.nan, "b": [np.float32("inf"), np.arange(2)], "path": Run})
    tree = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    assert tree["a"] is None
    assert tree["b"] == [None, [0, 1]]


def test_a_column_of_figures_is_set_right_even_where_one_is_not_finite(capsys):
    print_table([{"loss": "1.5", "n": 1}, {"loss": math.nan, "n": 2}])
    rows = capsys.readouterr().out.splitlines()
    assert next(r for r in rows if "1.5" in r).index("1.5") > 5
    assert any(r.strip().startswith("not finite") for r in rows)
