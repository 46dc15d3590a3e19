"""What commands print on a terminal of 80 and of 100 columns: names and hashes whole, no line broken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from rayexp.cli import cluster, runs, verify
from rayexp.cluster import jobs
from rayexp.cluster.jobs import Job
from rayexp.config import ExperimentConfig
from rayexp.launch.verify import Trial, Verdict
from rayexp.runs.records import EpochRecord
from rayexp.runs.run import Run
from rayexp.system.disk import append_line

Terminal = Callable[[], str]


def sha(number: int) -> str:
    return hashlib.sha256(bytes([number])).hexdigest()


@pytest.fixture
def made(tmp_path: Path) -> list[Run]:
    """Runs with long names and several metrics, and a damaged one."""
    found = []
    for i, name in enumerate(("tiny_imagenet", "quickstart-language", "r")):
        run = Run.create(ExperimentConfig(name=name, storage_path=tmp_path / "runs", epochs=20), argv=[])
        run.update(world_size=i, device="cpu", lanes=2, status="done")
        for epoch in range(1, 4):
            metrics = {"acc1": 48.73, "acc5": 75.3} if i != 1 else {"ppl": 181.234, "test_ppl": 170.1}
            record = EpochRecord(
                epoch, 400 * epoch, 2.1, 2.2, metrics, 0.01, 12345.6, {"total": 1234.5}, sha(epoch), world_size=i
            )
            append_line(run.epochs_path, json.dumps(record.to_json()))
        found.append(run)
    found[2].config_path.write_text("epochs: x\n")
    return found


def test_the_list_of_runs(made: list[Run], tmp_path: Path, terminal: Terminal) -> None:
    runs.runs_command(runs=tmp_path / "runs")
    out = terminal()
    assert all(f" {run.id}  " in out for run in made)
    assert out.count(f"  {sha(3)[:8]}\n") == 2
    assert "acc1 48.73" in out
    assert f"{made[2].id}: {made[2].config_path}" in " ".join(out.split())


def test_a_run_with_its_epochs(made: list[Run], tmp_path: Path, terminal: Terminal) -> None:
    for run in made[:2]:
        runs.runs_command(run.id, runs=tmp_path / "runs")
        table = terminal().partition("\n\n")[2]
        rows = [line for line in table.splitlines() if line.strip()[:1].isdigit()]
        assert [line.split()[-1] for line in rows] == [sha(epoch)[:8] for epoch in (1, 2, 3)]


def test_one_worker_is_one_worker(made: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for run in made[:2]:
        runs.runs_command(run.id, runs=tmp_path / "runs")
        said += [line for line in capsys.readouterr().out.splitlines() if line.startswith("where")]
    assert said == ["where     in one process, cpu, 2 replicas", "where     1 worker, cpu, 2 replicas"]


def test_verify(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}")

    def trial(label: str, workers: int, number: int) -> Trial:
        return Trial(label, workers, tuple({"step": s, "weights_sha": sha(number), "rate": 123456.7} for s in (1, 2)))

    trials = [trial(str(n), n, 0) for n in (0, 1, 2, 4, 8)] + [trial("8, one killed", 8, 0)]
    contrast = [trial(f"ddp {n}", n, n + 1) for n in (0, 1, 2, 4, 8)]
    verdict = Verdict("images", tuple(trials), tuple(contrast), ())
    monkeypatch.setattr("rayexp.launch.verify.verify", lambda *_, **__: verdict)
    with pytest.raises(typer.Exit):
        verify.verify(tmp_path / "c.yaml")
    out = terminal()
    assert out.count(f"  {sha(0)[:8]}  ") == 6
    assert "8, one killed" in out
    assert out.count(" 123,457 ") >= 6
    assert "e+" not in out
    assert verdict.rows()[0]["weights"] == sha(0)[:12]  # for scripts, as ever


def test_jobs(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(
        "raysubmit_AbCdEfGhIjKlMnOp", "tiny_imagenet-with-a-long-name", "succeeded", 0, "2026-11-26T15:28:30", 12345
    )
    monkeypatch.setattr(jobs, "jobs", lambda address: [job, job])
    cluster.jobs_command()
    out = terminal()
    assert out.count(f" {job.job}  ") == 2
    assert "succeeded" in out
