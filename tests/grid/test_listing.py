"""`rayexp runs --comparisons`, and the newest of runs and comparisons."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.errors import UserError
from rayexp.grid.comparison import Comparison
from rayexp.runs.run import Run
from rayexp.system.locks import only_driver


@pytest.fixture
def command(grids):
    """`rayexp ARGS --runs STORAGE`; an error that is not the user's is raised."""

    def run(*args):
        return CliRunner().invoke(app, [*args, "--runs", str(grids.storage)], catch_exceptions=False)

    return run


def test_comparisons_are_listed_with_how_far_they_are(grids, command) -> None:
    assert command("runs", "--comparisons").stdout == f"no comparisons in {grids.storage}\n"
    done, half = grids.plan(repeats=1, baseline=False), grids.plan(repeats=2, cpus=2, baseline=False)
    grids.fill(done, {name: rate for name, rate in grids.rates.items() if name != "cpu-plain"})
    done.update(status="done")
    grids.fill(half, {"cpu-x1-exact": 50.0}, repeats=1)
    rows = {row.pop("comparison"): row for row in json.loads(command("runs", "--comparisons", "--json").stdout)}
    assert rows == {
        done.id: {"status": "done", "cells": 6, "skipped": 0, "runs": "6/6", "failed": 0},
        half.id: {"status": "died", "cells": 4, "skipped": 2, "runs": "1/8", "failed": 0},
    }
    with only_driver(half.root):
        assert half.status() == "running"
    shown = command("runs", "--comparisons").stdout
    assert re.search(rf"{half.id} .*died .*1/8", shown)
    said = command("runs")
    assert said.stdout == f"no runs in {grids.storage}\n"
    assert "2 comparisons there, too: rayexp runs --comparisons" in said.stderr


def test_a_damaged_comparison_keeps_no_other_back(grids, command) -> None:
    whole, damaged = grids.plan(), grids.plan()
    damaged.meta_path.write_text("{}")
    answer = command("runs", "--comparisons")
    assert answer.exit_code == 0
    assert whole.id in answer.stdout
    assert re.search(rf"{damaged.id} .*damaged: ", answer.stdout)


def test_one_comparison_is_shown_by_report(grids) -> None:
    answer = CliRunner().invoke(app, ["runs", "x", "--comparisons", "--runs", str(grids.storage)])
    assert "`rayexp report NAME` shows one" in str(answer.exception)


def test_the_newest_may_be_a_comparison(grids, command) -> None:
    old = grids.plan()
    old.root.rename(grids.storage / "20260101T000000Z-old-0000")
    made = grids.plan(repeats=1)
    grids.fill(made, grids.rates)
    assert Comparison.find("@newest", grids.storage).id == made.id
    assert command("report", "@newest").stdout.strip() == str(made.root / "report.html")


def test_a_comparison_is_no_run_and_the_reverse(grids, command) -> None:
    made = grids.plan()
    Run.create(made.base().model_copy(update={"storage_path": grids.storage, "name": "alone"}), argv=[])
    for words in (["evaluate", "compare@1"], ["runs", made.id]):
        with pytest.raises(UserError, match=r"^no run '.*' in .*, but a comparison; give a run directory's"):
            command(*words)
    with pytest.raises(UserError, match=r"^no comparison 'alone' in .*, but a run; give a comparison directory's"):
        command("compare", "--resume", "alone")
    with pytest.raises(UserError, match=r"^no run and no comparison 'zzz' in"):
        command("report", "zzz")
