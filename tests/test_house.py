"""The walls of the house: imports run downward and never in a circle, each heavy library has its rooms, no two public
classes share a name, and a file can be read in one sitting."""

from __future__ import annotations

import ast
import functools
import graphlib
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
    ("library",),
    ("cli", "__main__"),
)
# Reads what lies on disk, and nothing that trains.
DIFF = {"errors", "display", "system", "config", "runs", "data", "pages", "diff"}
ROOMS = {
    "ray": ("launch/*", "cluster/*", "grid/run.py", "grid/screen.py"),
    "torch": ("engine/*", "workloads/*", "launch/worker.py", "grid/baseline.py", "library/checkpoints.py"),
    "torchvision": ("engine/*", "workloads/*", "launch/worker.py", "grid/baseline.py"),
    "safetensors": ("engine/*", "diff/weights.py"),
    "typer": ("cli/*",),
    "matplotlib": ("pages/plots.py", "grid/plots.py"),
    "jinja2": ("pages/page.py",),
    "tensorboardX": ("runs/tensorboard.py",),
    "mlflow": ("runs/trackers/mlflow.py",),
    "wandb": ("runs/trackers/wandb.py",),
    "torch.utils.tensorboard": (),  # one writer of event files is enough
    "filelock": ("system/locks.py",),
    "fcntl": ("system/locks.py",),
}


MAX_LINES = 400


def imports(path: Path, *, types: bool = True) -> tuple[str, ...]:
    """Dotted names of everything that a file imports, wherever in it; `types`: under TYPE_CHECKING too."""
    return imported(path.read_text(encoding="utf-8"), types)


@functools.cache  # every planted fault is looked for in the whole house, of which one file has changed
def imported(text: str, types: bool) -> tuple[str, ...]:
    return tuple(names(text, types))


def names(text: str, types: bool) -> Iterator[str]:
    for node in nodes(ast.parse(text), types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def nodes(tree: ast.AST, types: bool) -> Iterator[ast.AST]:
    waiting = [tree]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if types or not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
                yield node
                waiting.append(node)


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
                allowed = floor(other) <= floor(part) if other != "diff" else part in ("grid", "library", "cli")
            if not allowed:
                found.append(f"{where}: rayexp.{other}")
    return found


def copied(folder: Path) -> Path:
    """A copy of the package, to plant trespasses in."""
    return Path(shutil.copytree(HOUSE, folder / "rayexp"))


def plant(path: Path, lines: str) -> None:
    """Add lines at the end of a file."""
    with path.open("a") as file:
        file.write(f"\n{lines}\n")


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
    house = copied(tmp_path)
    plant(house / where, line)
    assert any(found.startswith(where) for found in trespasses(house))


def circle(house: Path) -> list[str]:
    """Modules that import each other in a circle, if any; those in functions count, those for types do not."""
    modules = {
        ".".join(path.relative_to(house.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in house.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for name in imports(path, types=False):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    assert circle(HOUSE) == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("diff/pair.py", "from rayexp.diff import images"),
        ("diff/statistics.py", "def late():\n    from rayexp.diff.churn import diff_all"),
        ("pages/page.py", "import rayexp.pages.run_page"),
    ],
)
def test_a_planted_circle_is_found(tmp_path: Path, where: str, line: str) -> None:
    house = copied(tmp_path)
    plant(house / where, f"if TYPE_CHECKING:\n    {line.splitlines()[-1].strip()}")
    assert circle(house) == []
    plant(house / where, line)
    assert "rayexp." + where.removesuffix(".py").replace("/", ".") in circle(house)


def namesakes(house: Path) -> dict[str, list[str]]:
    """Public classes of one name in several places, by name."""
    found: dict[str, list[str]] = {}
    for path in sorted(house.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(path.relative_to(house).as_posix())
    return {name: places for name, places in found.items() if len(places) > 1}


def test_no_two_classes_share_a_name() -> None:
    assert namesakes(HOUSE) == {}


def test_a_planted_namesake_is_found(tmp_path: Path) -> None:
    house = copied(tmp_path)
    plant(house / "diff" / "pair.py", "class Cell:\n    pass")
    assert namesakes(house)["Cell"] == ["diff/pair.py", "grid/comparison.py"]


def long_files(house: Path) -> list[str]:
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sorted(house.rglob("*.py"))}
    return [f"{path.relative_to(house)}: {count} lines" for path, count in counts.items() if count > MAX_LINES]


def test_every_file_can_be_read_in_one_sitting() -> None:
    assert long_files(HOUSE) == []


def test_a_planted_long_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text("pass\n" * MAX_LINES)
    (tmp_path / "long.py").write_text("pass\n" * (MAX_LINES + 1))
    assert long_files(tmp_path) == [f"long.py: {MAX_LINES + 1} lines"]


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
