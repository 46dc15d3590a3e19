"""`rayexp configs`, and the names it lists wherever a command takes CONFIG."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from rayexp.cli import main
from rayexp.config import headline, shipped_configs


@pytest.fixture
def typed(monkeypatch, capsys, tmp_path):
    """Run `rayexp WORDS` in this process, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["rayexp", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("columns", [80, 100])
def test_whole_descriptions_by_the_command_that_takes_it(typed, monkeypatch, columns) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = typed("configs")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    experiments, _, grids = out.partition("Grids, for compare:\n")
    listed = [
        [line.split()[0] for line in part.splitlines() if re.match(r"  \w", line)] for part in (experiments, grids)
    ]
    assert sorted(listed[0] + listed[1]) == sorted(shipped_configs())
    assert listed[1] == ["devices", "quickstart_devices"]
    for name, path in shipped_configs().items():
        assert f"{name} {headline(path)}" in " ".join(out.split())
    assert "\n  quickstart             A tour in minutes on two cores" in experiments


def test_as_json_in_full(typed) -> None:
    found = json.loads(typed("configs", "--json")[1])
    assert [one["name"] for one in found] == list(shipped_configs())
    assert {one["kind"] for one in found} == {"experiment", "grid"}
    assert all(Path(one["path"]).is_file() and one["what"].endswith(".") for one in found)
    assert all(one["what"].count("(") == one["what"].count(")") for one in found), "a sentence was cut"


@pytest.mark.parametrize(
    "words",
    [
        ("train", "CONFIG", "--dry-run"),
        ("verify", "CONFIG"),
        ("summary", "CONFIG"),
        ("submit", "CONFIG"),
        ("compare", "CONFIG", "--dry-run"),
    ],
    ids=lambda words: words[0],
)
def test_every_command_that_takes_one_names_the_nearest(typed, tmp_path, words) -> None:
    for wrong, nearest in (("quickstrat", "quickstart"), ("devises", "devices")):
        code, out, err = typed(*(wrong if word == "CONFIG" else word for word in words))
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert f"{wrong}: no such file" in err
        assert f"did you mean {nearest}" in err
    other = "quickstart" if words[0] == "compare" else "devices"
    code, out, err = typed(*(other if word == "CONFIG" else word for word in words))
    assert (code, out) == (2, "")
    assert "expected a" in err
    assert list(tmp_path.iterdir()) == []


def test_a_shipped_grid_is_planned_with_its_base(typed) -> None:
    code, out, _ = typed("compare", "quickstart_devices", "--dry-run")
    assert code == 0
    assert "cpu-x2-exact" in out
