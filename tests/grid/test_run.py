"""A device grid on disk, and its run: what is done, what is missing, and what ends it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rayexp.config import CompareConfig, ExperimentConfig, load, parse
from rayexp.errors import UserError
from rayexp.grid import run as grid
from rayexp.grid.comparison import CellResult, Comparison
from rayexp.grid.plan import base_of, plan
from rayexp.launch.on_ray import session as on_ray
from rayexp.launch.placement import Node
from rayexp.runs.run import Run
from rayexp.system.disk import now


def laptop(*scaling, **more):
    """What `grids` is asked to plan for two cores and no GPU."""
    return {"cpus": 2, "scaling": list(scaling), "reduction": ["exact"], **more}


def workers(number, use_gpu=False, **more):
    return {"num_workers": number, "use_gpu": use_gpu, **more}


SMALL = laptop(workers(0), workers(1), workers(1, use_gpu=True), repeats=2, baseline=False)


@pytest.fixture
def comparison(grids):
    return grids.plan(**SMALL)


def row(cell, repeat, status="done"):
    return CellResult(cell, repeat, status, None if status == "done" else "why", None, 1.0, now())


def test_repeats_are_interleaved_and_skipped_cells_left_out(comparison):
    assert [(cell.id, repeat) for cell, repeat in comparison.missing()] == [
        ("cpu-inprocess-exact", 1), ("cpu-x1-exact", 1), ("cpu-inprocess-exact", 2), ("cpu-x1-exact", 2),
    ]  # fmt: skip


def test_what_is_done_is_not_missing_and_what_failed_is(comparison):
    session = comparison.begin()
    comparison.add(row("cpu-inprocess-exact", 1), session)
    comparison.add(row("cpu-x1-exact", 1, "failed"), session)
    left = [(cell.id, repeat) for cell, repeat in comparison.missing()]
    assert left == [("cpu-x1-exact", 1), ("cpu-inprocess-exact", 2), ("cpu-x1-exact", 2)]
    comparison.add(row("cpu-x1-exact", 1), session)
    assert len(comparison.rows()) == 2


def test_a_row_of_a_killed_driver_is_not_taken(comparison):
    old = comparison.begin()
    comparison.begin()
    comparison.add(row("cpu-x1-exact", 1), old)
    assert comparison.rows() == []


def test_the_saved_grid_reads_back_and_repeats(comparison, grids):
    _, base, _ = grids.planned(**SMALL)
    again = load(comparison.root / "compare.yaml", kind=CompareConfig)
    assert base_of(again, comparison.root) == base
    assert [c.id for c in plan(again, base, [Node("here", 2, 0)])] == [c.id for c in comparison.cells()]


@pytest.mark.parametrize(("mode", "batch"), [("strong", 256), ("weak", 128)])
def test_a_plan_of_before_weak_and_strong_in_one_still_opens(grids, mode, batch):
    base = {"batch_size": 256 if mode == "strong" else 128}
    made = grids.plan(**laptop(workers(2, cpus_per_worker=0.5), mode=mode, base=base))
    now_planned = made.cells()
    meta = made.meta()
    for cell in meta["plan"]:
        del cell["modes"], cell["batch"]
    made.meta_path.write_text(json.dumps(meta))
    (made.root / "compare.yaml").write_text(
        (made.root / "compare.yaml").read_text().replace(f"mode:\n- {mode}", f"mode: {mode}")
    )
    assert made.cells() == now_planned
    assert [(cell.modes, cell.batch) for cell in now_planned] == [((), batch), ((mode,), batch)]


def test_a_newer_layout_is_refused(comparison):
    comparison.meta_path.write_text(json.dumps({**comparison.meta(), "layout": 2}))
    with pytest.raises(UserError, match="layout 2 is newer"):
        Comparison.find(str(comparison.root), comparison.root.parent)


def test_find_by_part_of_the_name(comparison):
    storage = comparison.root.parent
    assert Comparison.find(comparison.id[-4:], storage).id == comparison.id
    with pytest.raises(UserError, match="no comparison 'nope'"):
        Comparison.find("nope", storage)


def test_only_one_driver_at_a_time(comparison):
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True);"
    lock = str(comparison.root / "driver.lock")
    with subprocess.Popen(
        [sys.executable, "-c", f"{code} time.sleep(60)", lock], stdout=subprocess.PIPE
    ) as other:  # fmt: skip
        other.stdout.readline()
        try:
            with pytest.raises(UserError, match="another process is running it"):
                grid.go(comparison)
        finally:
            other.kill()


def test_a_dead_run_is_buried_and_kept(comparison):
    cell = next(c for c in comparison.cells() if c.skip is None)
    run = Run.create(parse({**cell.config, "storage_path": str(comparison.cells_path)}, ExperimentConfig, "x"), argv=[])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.update(pid=gone.pid)
    session = comparison.begin()
    for one, repeat in comparison.missing():
        comparison.add(row(one.id, repeat), session)
    grid.go(comparison)
    assert run.meta()["status"] == "stopped"
    assert "measured anew" in run.meta()["error"]
    assert comparison.meta()["status"] == "done"


def test_workers_find_their_cores_free(grids):
    asked = laptop(workers(0), workers(2), workers(0, use_gpu=True))
    cells = {cell.id: cell for cell in grids.planned(**asked | {"cpus": 16, "gpus": 4})[2]}
    held = {name: grid.resources(cell, "node:1", 16) for name, cell in cells.items()}
    assert held["cpu-x2-exact"] == {"node:1": grid.SHARE}
    assert held["cpu-inprocess-exact"]["CPU"] == 16
    assert held["gpu-inprocess-exact"]["GPU"] == 1
    assert held["gpu-plain"]["GPU"] == 1


def test_a_cell_that_fails_is_a_row_with_its_error(comparison):
    cell = next(c for c in comparison.cells() if c.workers == 0)
    broken = {**cell.config, "data": {"name": "folder", "root": "/nowhere"}}
    made = grid.measure(comparison, type(cell)(**{**as_words(cell), "config": broken}), 1)
    assert made.status == "failed"
    assert "/nowhere" in made.error
    assert made.run is None


def as_words(cell):
    return {name: getattr(cell, name) for name in cell.__dataclass_fields__}


def test_wrong_data_stops_before_the_first_cell(tmp_path, grids):
    planned = grids.planned(**laptop(workers(0), base={"data": {"name": "folder", "root": str(tmp_path / "none")}}))
    with pytest.raises(UserError, match="none"):
        grid.start(*planned, argv=[])
    assert not (tmp_path / "runs").exists()


def test_a_grid_without_any_cell_is_refused(tmp_path, grids):
    with pytest.raises(UserError, match="8 GPUs asked"):
        grid.start(*grids.planned(**laptop(workers(8, use_gpu=True))), argv=[])
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_the_plan_of_a_comparison_that_has_begun(comparison, typed):
    session = comparison.begin()
    comparison.add(row("cpu-inprocess-exact", 1), session)
    words = ("compare", "--resume", comparison.root, "--dry-run")
    done = typed(*words, "--json")
    assert done.returncode == 0
    assert [cell["id"] for cell in json.loads(done.stdout)["cells"]] == [cell.id for cell in comparison.cells()]
    assert done.stderr == f"3 runs to go, in {comparison.root}\n"
    assert "skipped: 1 GPU asked" in " ".join(typed(*words).stdout.split())


def test_dry_run_shows_the_plan_and_makes_nothing(tmp_path, alone, typed, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", alone["RAY_TMPDIR"])
    (tmp_path / "base.yaml").write_text("name: base\n")
    (tmp_path / "grid.yaml").write_text(
        "base: base.yaml\nscaling: [{num_workers: 1, use_gpu: false}, {num_workers: 64, use_gpu: true}]\n"
    )
    done = typed("compare", "grid.yaml", "repeats=1", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    cells = {cell["id"]: cell for cell in json.loads(done.stdout)["cells"]}
    assert cells["cpu-x1-exact"]["skip"] is None
    assert "64 GPUs asked" in cells["gpu-x64-exact"]["skip"]
    assert not (tmp_path / "runs").exists()


def test_a_comparison_that_goes_on_settles_the_token_before_ray_is_imported(comparison, monkeypatch):
    """Ray reads when it is imported whether it wants a token; another import than the planning's may not be first."""

    def prepare(address):
        assert address == "there:1"
        raise UserError("prepared")

    monkeypatch.setattr(on_ray, "prepare", prepare)
    monkeypatch.setitem(sys.modules, "ray", None)  # cannot be imported
    with pytest.raises(UserError, match="prepared"):
        grid.go(comparison, address="there:1")
    assert comparison.meta()["status"] == "failed"
