"""A source tree that is not installed, as a job of `ray job submit --working-dir .` has it."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rayexp
from rayexp.grid import run
from rayexp.launch import doctor

HIDE = """
import importlib.metadata, sys
real = importlib.metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name == "rayexp":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(cls, name)
importlib.metadata.Distribution.from_name = classmethod(from_name)
"""


def test_the_versions_of_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    run.environment()  # imports torch, which would itself believe the versions below

    def version(name: str) -> str:
        if name in ("rayexp", "torchvision"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "7"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert run.environment()["versions"] == {
        "rayexp": rayexp.__version__,
        "torch": "7",
        "torchvision": "missing",
        "ray": "7",
        "numpy": "7",
    }
    assert f"rayexp {rayexp.__version__}, numpy 7" in doctor._rayexp(Path()).found


def test_a_comparison_begins_there(tmp_path: Path) -> None:
    source = Path(rayexp.__file__).parent
    shutil.copytree(source, tmp_path / "rayexp", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "base.yaml").write_text("data: {name: shapes, image_size: 32}\n")
    (tmp_path / "grid.yaml").write_text("base: base.yaml\nscaling: [{num_workers: 0, use_gpu: false}]\n")
    code = HIDE + (
        f"tree = {str(tmp_path)!r}\nsys.path.insert(0, tree)\nimport rayexp\nassert rayexp.__file__.startswith(tree)\n"
        "from pathlib import Path\nfrom rayexp.config import CompareConfig, load\nfrom rayexp.grid import run as grid\n"
        "config = load('grid.yaml', kind=CompareConfig)\n"
        "print(grid.start(config, *grid.planned(config, Path('.')), argv=[]).root)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_dir()
