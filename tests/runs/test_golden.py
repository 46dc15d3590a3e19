"""Runs of layout 1 as the first edition wrote them: they open for ever (see golden/README.md)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.cluster.collect import collect
from rayexp.cluster.sources import Storage
from rayexp.config import ExperimentConfig
from rayexp.errors import UserError
from rayexp.grid.comparison import Comparison
from rayexp.runs.integrity import check_config, examine
from rayexp.runs.run import Run, resolve
from rayexp.runs.writer import RunWriter

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy that may be written into."""
    return Path(shutil.copytree(GOLDEN / "runs", tmp_path / "runs"))


@pytest.fixture
def command(golden: Path) -> Callable[..., Any]:
    """`rayexp ARGS --runs GOLDEN`: what it prints; an error that is not the user's is raised."""

    def run(*args: str, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [*args, "--runs", str(golden)], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if "--json" in args else result.stdout

    return run


def test_they_are_listed(command: Callable[..., Any]) -> None:
    rows = {row["run"].split("-")[1]: row for row in command("runs", "--json")}
    shown = {name: [row[key] for key in ("status", "epochs", "best", "last weights")] for name, row in rows.items()}
    assert shown == {
        "words": ["done", "3/3", 3, "c0afeebd7c0e"],
        "pictures": ["done", "2/2", 2, "fe483094983e"],
        "stopped": ["stopped", "0/3", None, None],
    }
    assert "c0afeebd" in command("runs", "words")


def test_references(golden: Path) -> None:
    assert resolve("words@best", golden)[1] == 3
    assert resolve("pictures@best", golden)[1] == 2
    assert resolve("words", golden)[1] == 3
    with pytest.raises(UserError, match="no epoch has finished"):
        resolve("stopped@best", golden)


@pytest.mark.parametrize("name", ["words", "pictures", "stopped"])
def test_nothing_is_damaged_and_nothing_is_covered(golden: Path, command: Callable[..., Any], name: str) -> None:
    found = examine(Run.find(name, golden))
    assert {finding.state for finding in found} == {"not covered"}
    assert "not covered by one" in command("runs", name, "--check")


def test_a_resume_takes_the_newest_step_and_covers_from_there(golden: Path) -> None:
    run = Run.find("stopped", golden)
    check_config(run)
    files, notes = RunWriter(run).resume()
    assert files is not None
    assert (json.loads(files["state.json"])["step"], notes) == (8, [])
    run.write("config.yaml", run.config().to_yaml())
    assert run.files().keys() == {"config.yaml"}


def test_a_finished_one_has_nothing_to_go_on_with(golden: Path) -> None:
    run = Run.find("words", golden)
    before = run.epochs_path.read_bytes()
    files, notes = RunWriter(run).resume()
    assert files is not None
    assert (json.loads(files["state.json"])["epoch"], notes) == (3, [])
    # The same lines; the fields of today are empty in them.
    assert [json.loads(line) | {"predictions_sha": "", "busy": None} for line in before.splitlines()] == [
        json.loads(line) | {"predictions_sha": ""} for line in run.epochs_path.read_bytes().splitlines()
    ]


def test_a_diff_between_epochs(command: Callable[..., Any]) -> None:
    pictures = command("diff", "pictures@1", "pictures@2", "--json")
    assert pictures["n"] == 32
    words = command("diff", "words@1", "words@last", "--json")
    assert words["n"] == 168 - 2  # the first token of each of the two columns is not predicted


def test_a_report_of_each(golden: Path, command: Callable[..., Any]) -> None:
    for name in ("words", "pictures"):
        page = Path(command("report", name).strip())
        assert page.is_file()
        assert "not finite" not in page.read_text()
    assert "grid" in command("report", "grid")


def test_the_comparison(golden: Path) -> None:
    from rayexp.grid.report import read_report

    made = Comparison.find("grid", golden)
    found = read_report(made)
    assert found.equal
    assert {line.cell.id for line in found.cells} == {"cpu-plain", "cpu-inprocess-exact", "cpu-inprocess-ddp"}
    assert not found.failed
    assert made.missing() == []
    for row in made.rows():
        run = made.run(row)
        assert run is not None
        assert {finding.state for finding in examine(run)} == {"not covered"}


@pytest.mark.parametrize("file", ["run.json", "epochs.jsonl", "steps.jsonl", "config.yaml"])
def test_one_damaged_run_of_a_comparison_is_named_and_the_others_are_reported(
    golden: Path, command: Callable[..., Any], file: str
) -> None:
    from rayexp.grid.report import read_report

    made = Comparison.find("grid", golden)
    (bad,) = (run for run in Run.all(made.cells_path) if "exact-r2" in run.id)
    (bad.root / file).write_bytes(b"\xff\n")
    found = read_report(made)
    assert {line.cell.id for line in found.cells} == {"cpu-plain", "cpu-inprocess-exact", "cpu-inprocess-ddp"}
    ((cell, repeat, why),) = found.failed
    assert (cell, repeat) == ("cpu-inprocess-exact", 2)
    assert f"{bad.id}/{file}: " in why
    command("report", "grid")


def test_the_weights_are_read_and_predict_as_they_did(golden: Path, tmp_path: Path) -> None:
    import torch

    from rayexp import workloads
    from rayexp.engine import checkpoint, evaluate, runtime
    from rayexp.engine.group import WorkerGroup

    run = Run.find("words", golden)
    data = run.config().data.model_copy(update={"root": GOLDEN / "text"})
    config: ExperimentConfig = run.config().model_copy(update={"data": data})
    workload = workloads.open_workload(config)
    assert {key: workload.describe()[key] for key in ("train_sha", "val_sha")} == {
        key: run.data()[key] for key in ("train_sha", "val_sha")
    }
    here = runtime.configure(config, torch.device("cpu"), config.shards)
    for record in run.records():
        folder = run.checkpoint(record.epoch)
        model = checkpoint.load_model(workload, {file.name: file.read_bytes() for file in folder.iterdir()})
        said = evaluate.predict(workload, [model] * here.replicas, WorkerGroup(), here)
        assert workload.metrics(said)["val_loss"] == pytest.approx(record.val_loss, rel=1e-4)
        stored = run.predictions(record.epoch)
        assert (stored["offset"] == said["offset"]).all()
        assert stored["loss"] == pytest.approx(said["loss"], rel=1e-3, abs=1e-4)


def test_they_are_collected(golden: Path, tmp_path: Path) -> None:
    for path in golden.iterdir():
        if (path / "run.json").exists():
            got = collect(Storage(str(path)), path.name, tmp_path / "home")
            assert got.run.records() == Run(path).records()
