"""The walls of the house: imports run downward, and each heavy library has its rooms."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "rayexp"

# From the ground up; a module imports only from floors below its own, and from its own floor.
FLOORS = (
    ("errors", "display"),
    ("system",),
    ("config",),
    ("runs",),
    ("data",),
    ("pages",),
    ("engine",),
    ("workloads",),
    ("cluster",),
    ("launch",),
    ("grid",),
    ("cli", "__main__"),
)
# Reads what lies on disk, and nothing that trains.
DIFF = {"errors", "display", "system", "config", "runs", "data", "pages", "diff"}
ROOMS = {
    "ray": ("launch/*", "cluster/*", "grid/run.py", "grid/screen.py"),
    "torch": ("engine/*", "workloads/*", "launch/worker.py", "grid/baseline.py"),
    "torchvision": ("engine/*", "workloads/*", "launch/worker.py", "grid/baseline.py"),
    "safetensors": ("engine/*", "diff/weights.py"),
    "typer": ("cli/*",),
    "matplotlib": ("pages/plots.py", "grid/plots.py"),
    "jinja2": ("pages/page.py",),
    "tensorboardX": ("runs/tensorboard.py",),
    "torch.utils.tensorboard": (),  # one writer of event files is enough
    "filelock": ("system/locks.py",),
    "fcntl": ("system/locks.py",),
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def floor(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def trespasses(house: Path) -> list[str]:
    found = []
    for path in sorted(house.rglob("*.py")):
        where = path.relative_to(house).as_posix()
        part = where.split("/")[0].removesuffix(".py")
        for name in imports(path):
            top, _, rest = name.partition(".")
            for library, rooms in ROOMS.items():
                if f"{name}.".startswith(f"{library}.") and not any(fnmatch(where, room) for room in rooms):
                    found.append(f"{where}: {library}")
            if top != "rayexp" or part == "__init__" or rest in ("", "__version__"):
                continue
            other = rest.split(".")[0]
            if part == "diff":
                allowed = other in DIFF
            else:
                allowed = floor(other) <= floor(part) if other != "diff" else part in ("grid", "cli")
            if not allowed:
                found.append(f"{where}: rayexp.{other}")
    return found


def test_nobody_trespasses() -> None:
    assert trespasses(HOUSE) == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("engine/step.py", "import ray"),
        ("workloads/language_model/workload.py", "import ray.train"),
        ("data/pack.py", "import torch"),
        ("runs/run.py", "from torch import nn"),
        ("launch/driver.py", "import typer"),
        ("diff/images.py", "import matplotlib.pyplot"),
        ("launch/driver.py", "from tensorboardX import SummaryWriter"),
        ("launch/worker.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("engine/trainer.py", "from rayexp import workloads"),
        ("engine/trainer.py", "from rayexp.launch.placement import Placement"),
        ("config/loading.py", "from rayexp.runs.run import Run"),
        ("diff/images.py", "from rayexp.engine import checkpoint"),
        ("data/pack.py", "def late():\n    import torch"),
        ("runs/run.py", "import importlib\nimportlib.import_module('ray.train')"),
    ],
)
def test_a_planted_trespass_is_found(tmp_path: Path, where: str, line: str) -> None:
    house = tmp_path / "rayexp"
    shutil.copytree(HOUSE, house)
    with (house / where).open("a") as file:
        file.write(f"\n{line}\n")
    assert any(found.startswith(where) for found in trespasses(house))


@pytest.mark.parametrize("command", ["--help", "train --help", "verify --help", "diff --help", "runs --runs /nowhere"])
def test_help_opens_without_the_heavy_libraries(command: str) -> None:
    code = (
        "import sys; sys.argv = ['rayexp', *sys.argv[1:]]\n"
        "from rayexp.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'torchvision', 'matplotlib', 'scipy', 'pandas', 'tensorboardX'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
