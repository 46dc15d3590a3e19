"""The device grid on Ray Tune, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rayexp.grid.comparison import PLAIN, Comparison
from rayexp.runs.run import Run

GRID = """
name: small
base: base.yaml
scaling:
  - {num_workers: 0, use_gpu: false}
  - {num_workers: 2, use_gpu: false, cpus_per_worker: 0.5}
  - {num_workers: 8, use_gpu: true}
repeats: 1
"""


@pytest.mark.ray
@pytest.mark.slow
def test_killed_in_the_middle_of_a_cell_and_resumed_gives_the_full_table(tmp_path, alone, tiny_images):
    import yaml

    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"name": "base", **tiny_images}))
    command = [sys.executable, "-m", "rayexp", "compare"]
    with (tmp_path / "err").open("w") as err:
        first = subprocess.Popen([*command, "grid.yaml"], cwd=tmp_path, env=alone, stderr=err, stdout=err)
        try:
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline and not list(tmp_path.glob("runs/*/cells/*cpu-x2*")):
                assert first.poll() is None, (tmp_path / "err").read_text()
                time.sleep(0.1)
        finally:
            first.kill()
            first.wait()
    (root,) = (tmp_path / "runs").iterdir()
    comparison = Comparison(root)
    before = {row.cell: row.run for row in comparison.rows()}
    assert set(before) == {"cpu-plain", "cpu-inprocess-exact"}
    done = subprocess.run(
        [*command, "--resume", str(root), "--json"], cwd=tmp_path, env=alone, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {cell["cell"] for cell in found["cells"]} == {"cpu-plain", "cpu-inprocess-exact", "cpu-x2-exact"}
    assert found["equal_weights"] is True
    assert found["groups"][0]["runs"] == 2
    assert found["skipped"][-1]["cell"] == "gpu-x8-exact"
    assert found["missing"] == 0
    after = {row.cell: row.run for row in comparison.rows()}
    assert {cell: after[cell] for cell in before} == before  # nothing that was done ran again
    assert (root / "report.html").is_file()
    assert not (root / "tune").exists()
    statuses = {run.meta()["status"] for run in Run.all(comparison.cells_path)}
    assert statuses <= {"done", "stopped"}
    assert all(cell["reduction"] in ("exact", PLAIN) for cell in found["cells"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_cell_whose_process_is_killed_fails_alone(tmp_path, alone, tiny_images):
    import yaml

    scaling = [{"num_workers": n, "use_gpu": False, "cpus_per_worker": 0.5} for n in (1, 2)]
    tree = {"base": "base.yaml", "scaling": scaling, "repeats": 1, "baseline": False, "overrides": {"epochs": 30}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"name": "base", **tiny_images}))
    command = [sys.executable, "-m", "rayexp", "compare", "grid.yaml", "--json"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        grid_process = subprocess.Popen(command, cwd=tmp_path, env=alone, stdout=out, stderr=err)
        try:
            deadline = time.monotonic() + 240
            while not (begun := list(tmp_path.glob("runs/*/cells/*cpu-x1*/epochs.jsonl"))):
                assert time.monotonic() < deadline
                assert grid_process.poll() is None, (tmp_path / "err").read_text()
                time.sleep(0.1)
            os.kill(json.loads((begun[0].parent / "run.json").read_bytes())["pid"], signal.SIGKILL)
            assert grid_process.wait(timeout=300) == 1
        finally:
            grid_process.kill()
            grid_process.wait()
    found = json.loads((tmp_path / "out").read_text())
    assert [cell["cell"] for cell in found["cells"]] == ["cpu-x2-exact"]  # whose workers had room
    assert found["failed"] == [
        {"cell": "cpu-x1-exact", "repeat": 1, "error": "its process died: killed, or out of memory"}
    ]
    assert "1 of the runs failed (cpu-x1-exact)" in (tmp_path / "err").read_text()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_stops_the_grid_and_has_its_exit_code(tmp_path, alone, tiny_images, number, code):
    import yaml

    tree = {"base": "base.yaml", "scaling": [{"num_workers": 0, "use_gpu": False}], "repeats": 1, "baseline": False}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"name": "base", **tiny_images, "epochs": 1000}))
    command = [sys.executable, "-m", "rayexp", "compare", "grid.yaml"]
    with (tmp_path / "err").open("w") as err:
        grid_process = subprocess.Popen(command, cwd=tmp_path, env=alone, stdout=err, stderr=err)
        try:
            deadline = time.monotonic() + 240
            while not list(tmp_path.glob("runs/*/cells/*/epochs.jsonl")):
                assert time.monotonic() < deadline
                assert grid_process.poll() is None, (tmp_path / "err").read_text()
                time.sleep(0.1)
            grid_process.send_signal(number)
            assert grid_process.wait(timeout=60) == code, (tmp_path / "err").read_text()
        finally:
            grid_process.kill()
            grid_process.wait()
    (root,) = (tmp_path / "runs").iterdir()
    assert (Comparison(root).meta()["status"], len(Comparison(root).missing())) == ("stopped", 1)
    assert "interrupted\ngo on with: rayexp compare --resume" in (tmp_path / "err").read_text()
