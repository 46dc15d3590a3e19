"""The tour's commands, copied from the screen and typed where the tour was, do what the tour did."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.cli import quickstart as tour
from rayexp.config import CompareConfig, ExperimentConfig, load
from rayexp.runs.run import Run

TINY_TEXT = {
    "name": "tiny-text",
    "workload": "language_model",
    "data": {"name": "python_docs", "bptt": 20, "max_train_tokens": 3000, "max_val_tokens": 600},
    "model": {"name": "lstm", "emsize": 8, "nhid": 8, "nlayers": 1},
    "epochs": 1,
    "batch_size": 4,
    "shards": 2,
    "lr": 1.0,
}


@pytest.fixture
def tiny_tour(tmp_path: Path, tiny_images: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The tour on small configurations, in a folder that is no checkout; returns what it gave to `compare`, which is
    not run."""
    (tmp_path / "shipped").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    trees = {
        "quickstart": {"name": "tiny-images", **tiny_images, "model": {"name": "squeezenet1_0"}},
        "quickstart_language": TINY_TEXT,
        "quickstart_devices": {"base": "quickstart.yaml", "scaling": [{"num_workers": 0}]},
    }
    for name, tree in trees.items():
        (tmp_path / "shipped" / f"{name}.yaml").write_text(json.dumps(tree))
    monkeypatch.setattr("rayexp.config.shipped", lambda name: tmp_path / "shipped" / name)
    compared: list[list[str]] = []

    def compare(config: str, runs: Path | None = None) -> None:
        page = (runs or Path("runs")) / "1-quickstart-devices-1" / "report.html"
        page.parent.mkdir()
        page.touch()
        compared.append([config, str(runs)])

    commands = typer.main.get_command(app)
    monkeypatch.setattr(
        commands.commands["compare"], "callback", lambda **given: compare(given["config"], given["runs"])
    )
    monkeypatch.setattr(typer.main, "get_command", lambda _: commands)
    return compared


def test_the_commands_do_what_the_tour_did(tiny_tour: list[list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    runs = "my runs"
    tour.quickstart(Path(runs))
    out, err = capfd.readouterr()
    lines = [line.removeprefix("$ ") for line in err.splitlines() if line.startswith("$ rayexp ")]
    done = [shlex.split(line)[1:] for line in lines]
    assert [words[0] for words in done] == [
        "summary",
        "train",
        "diff",
        "train",
        "generate",
        "compare",
        "report",
        "report",
    ]
    made = Run.all(Path(runs))
    assert tiny_tour == [[done[5][1], runs]]
    assert load(done[5][1], kind=CompareConfig).base == "quickstart.yaml"
    again = {}
    for line in [line for line in lines if "compare" not in line]:
        words = shlex.split(line)[1:]
        ended = CliRunner().invoke(app, words)
        assert ended.exit_code == 0, ended.output
        again[line] = ended.stdout
    both = Run.all(Path(runs))
    assert len(both) == 2 * len(made) == 4, "the runs were made in the same folder"
    for name in ("tiny-images", "tiny-text"):
        first, second = (run for run in both if name in run.id)
        assert [r.weights_sha for r in first.records()] == [r.weights_sha for r in second.records()]
        assert first.config() == second.config()
    for line, stdout in again.items():
        if line.split()[1] != "train":
            assert re.sub(r"\s+", " ", stdout) in re.sub(r"\s+", " ", out), line
    assert {run.id for run in made} < {run.id for run in both}
    checked = CliRunner().invoke(app, ["runs", "--runs", runs, "--check"])
    assert checked.exit_code == 0
    assert checked.stdout.count(": ok (") == len(both)
    assert "not covered" not in checked.stdout  # said only where there is something


def test_its_last_lines_lead_somewhere(tiny_tour: list[list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    tour.quickstart(Path("my runs"))
    opened, _, tried = capfd.readouterr().err.partition("Open in a browser:\n")[2].partition("Try next")
    pages = [Path(line.strip()) for line in opened.splitlines() if line.endswith(".html")]
    assert len(pages) == 4
    assert all(page.is_file() for page in pages)
    assert 'href="diff.html"' in pages[0].read_text()
    next_ones = [shlex.split(line) for line in tried.splitlines() if line.startswith("  rayexp ")]
    assert [words[1] for words in next_ones] == ["train", "verify", "runs"]
    train, verify, runs = next_ones
    for words in ([*train, "--dry-run"], [*verify, "--help"], runs):
        ended = CliRunner().invoke(app, words[1:])
        assert ended.exit_code == 0, ended.output
    assert all(run.id in ended.stdout for run in Run.all(Path("my runs")))


def test_the_usual_folder_is_not_named(
    tiny_tour: list[list[str]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "epochs", lambda run: [1, 2])

    def only_said(*words: str) -> None:
        assert "--runs" not in words
        if words[0] == "train":
            Run.create(ExperimentConfig(name=f"n{len(list(Path('runs').glob('*')))}"), argv=[])
        if words[0] == "compare":
            (Path("runs") / "1-quickstart-devices-1").mkdir()
            (Path("runs") / "1-quickstart-devices-1" / "report.html").touch()

    monkeypatch.setattr(tour, "_do", only_said)
    tour.quickstart(Path("runs"))
    assert {"  rayexp runs", "  tensorboard --logdir runs"} < set(capfd.readouterr().err.splitlines())


def test_the_start_up_of_a_run_is_its_own(
    tmp_path: Path, tiny_images: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[float] = []

    def run(config: ExperimentConfig, *, started: float, **_: Any) -> Run:
        began.append(started)
        return Run.create(config, argv=[])

    (tmp_path / "c.yaml").write_text(json.dumps(tiny_images))
    monkeypatch.setattr("rayexp.launch.driver.run", run)
    before = time.monotonic()
    tour._do("train", str(tmp_path / "c.yaml"), "--runs", str(tmp_path))
    assert before <= began[0] <= time.monotonic(), "counted from the start of the process"


def test_a_command_that_fails_ends_the_tour(monkeypatch: pytest.MonkeyPatch) -> None:
    from rayexp.launch import doctor

    monkeypatch.setattr(doctor, "_LOOKS", (lambda folder: doctor.Check("disk", "full", ok=False),))
    with pytest.raises(typer.Exit) as caught:
        tour._do("doctor")
    assert caught.value.exit_code == 1
