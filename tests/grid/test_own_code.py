"""A grid over a model of the user's own: every cell runs the code of the beginning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rayexp.config import CompareConfig, load
from rayexp.errors import UserError
from rayexp.grid.comparison import Comparison
from rayexp.grid.run import measure, planned, start

EXAMPLES = Path(__file__).parents[2] / "examples"
GRID = """
base: base.yaml
overrides: {OVERRIDES}
scaling: [{num_workers: 0, use_gpu: false}]
baseline: false
repeats: 2
"""
BASE = """
model: {name: MODEL, width: 2}
data: {name: shapes, max_train_samples: 32, max_val_samples: 16, image_size: 16}
batch_size: 16
shards: 2
epochs: 1
"""


def folder_of(tmp_path: Path, model: str, overrides: str) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(EXAMPLES / "own_model.py", folder / "own_model.py")
    shutil.copy(EXAMPLES / "own_model.py", folder / "other.py")
    (folder / "base.yaml").write_text(BASE.replace("MODEL", model))
    (folder / "grid.yaml").write_text(GRID.replace("{OVERRIDES}", overrides))
    return folder


def comparison(tmp_path: Path, folder: Path) -> Comparison:
    config = load(folder / "grid.yaml", [f"storage_path={tmp_path / 'runs'}"], CompareConfig)
    base, cells = planned(config, folder)
    return start(config, base, cells, argv=[])


def test_all_cells_run_the_code_of_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "cache"))
    folder = folder_of(tmp_path, "./own_model.py:SmallNet", "{seed: 3}")
    made = comparison(tmp_path, folder)
    (cell,) = made.cells()
    first = measure(made, cell, 1)
    (folder / "own_model.py").write_text("raise SystemExit('edited while the grid ran')")
    moved = Comparison(made.root.rename(tmp_path / "runs" / "moved"))
    second = measure(moved, cell, 2)
    assert (first.error, second.error) == (None, None)
    copies = [(moved.cells_path / str(row.run) / "code" / "own_model.py").read_bytes() for row in (first, second)]
    assert copies == [(EXAMPLES / "own_model.py").read_bytes()] * 2
    (moved.root / "code" / "own_model.py").write_text("# another")
    assert "code/own_model.py: not what the run wrote" in str(measure(moved, cell, 3).error)
    with pytest.raises(UserError, match=r"^moved: code/own_model.py: "):
        moved.with_copy(load(folder / "base.yaml"))
    # A comparison of before there was a copy.
    meta = json.loads(moved.meta_path.read_text())
    moved.meta_path.write_text(json.dumps({key: value for key, value in meta.items() if key != "code"}))
    config = load(folder / "base.yaml")
    assert moved.with_copy(config) == config


@pytest.mark.parametrize(
    "overrides",
    ["{model: {name: './other.py:SmallNet'}}", "{model.name: './other.py:SmallNet'}", "{model.name: 'other:SmallNet'}"],
)
@pytest.mark.parametrize("base", ["./own_model.py:SmallNet", "resnet18"])
def test_a_file_under_overrides_lies_beside_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str, base: str
) -> None:
    folder = folder_of(tmp_path, base, overrides)
    if base == "resnet18":
        (folder / "base.yaml").write_text(BASE.replace("MODEL, width: 2", "resnet18"))
    monkeypatch.chdir(tmp_path)
    config = load("mine/grid.yaml", kind=CompareConfig)
    _, (cell,) = planned(config, folder)
    assert cell.config["model"]["name"] == "other.py:SmallNet"
    made = Comparison.create(config, load(folder / "base.yaml"), (cell,), {})
    assert (made.root / "code" / "other.py").is_file()
    again = load(made.root / "compare.yaml", kind=CompareConfig)
    assert planned(again, made.root)[1][0].config["model"]["name"] == "other.py:SmallNet"
