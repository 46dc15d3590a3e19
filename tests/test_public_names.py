"""Ray by its public names: no private module is imported or reached into, nothing of Ray is replaced or subclassed."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "rayexp"
# Documented for being subclassed.
EXTENDED = {"ray.tune.Callback", "ray.train.UserCallback"}


def private(name: str) -> bool:
    """Whether a dotted name of Ray's is none that it promises to keep."""
    parts = name.split(".")
    dunder = parts[-1].startswith("__") and parts[-1].endswith("__")
    hidden = any(part.startswith("_") for part in (parts[:-1] if dunder else parts))
    return hidden or name.startswith("ray.train.v2")


def names(tree: ast.AST) -> dict[str, str]:
    """What the names of a file stand for, where that is something of Ray's."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "ray":
                    found[alias.asname or "ray"] = alias.name if alias.asname else "ray"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def spelled(node: ast.AST, known: dict[str, str]) -> str:
    """The dotted name of Ray's that an expression spells; empty where it is none."""
    if isinstance(node, ast.Name):
        return known.get(node.id, "")
    if isinstance(node, ast.Attribute) and (owner := spelled(node.value, known)):
        return f"{owner}.{node.attr}"
    return ""


def trespasses(path: Path) -> Iterator[str]:
    """What a file does to Ray that it must not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = names(tree)
    for node in ast.walk(tree):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            imported = [spelled(node, known)]
            if not isinstance(node.ctx, ast.Load) and imported[0]:
                yield f"{path.name}:{node.lineno}: {imported[0]} is replaced"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            literal = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            owners = [name for arg in node.args[:1] if (name := spelled(arg, known))]
            if called.endswith("import_module"):
                imported = literal
            elif called in ("getattr", "setattr", "delattr", "hasattr", "vars", "patch.setattr") and owners:
                imported = [f"{owners[0]}.{name}" for name in literal]
                if called not in ("getattr", "hasattr"):
                    yield f"{path.name}:{node.lineno}: {ast.unparse(node)} changes Ray"
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                name = spelled(base, known)
                if name and name not in EXTENDED:
                    yield f"{path.name}:{node.lineno}: {node.name} is a {name}"
        yield from (
            f"{path.name}:{node.lineno}: {name} is private"  # type: ignore[attr-defined]
            for name in imported
            if name.split(".")[0] == "ray" and private(name)
        )


def test_ray_is_used_by_its_public_names() -> None:
    assert [line for path in sorted(HOUSE.rglob("*.py")) for line in trespasses(path)] == []


def test_the_tests_use_public_names_of_ray_too() -> None:
    assert [line for path in sorted((ROOT / "tests").rglob("*.py")) for line in trespasses(path)] == []


PLANTED = [
    "from ray._private.node import Node",
    "import ray._raylet",
    "from ray import _private",
    "from ray.train._internal.utils import get_address_and_port",
    "from ray.train.v2.api.config import RunConfig",
    "import importlib\nimportlib.import_module('ray._private.worker')",
    "import ray\nnode = ray._private.worker._global_node",
    "import ray.train\nray.train.torch.TorchTrainer._create_default_callbacks",
    "import ray\ngetattr(ray, '_private')",
    "import ray\nray.init = print",
    "from ray.train import torch as rays\nrays.TorchTrainer = object",
    "import ray\nsetattr(ray, 'init', print)",
    "from ray.runtime_context import RuntimeContext\nRuntimeContext.current_actor = None",
    "def late():\n    from ray.train.torch import TorchTrainer\n    class Mine(TorchTrainer): pass",
    "import ray.train\nclass Mine(ray.train.BackendConfig): pass",
    "from ray.train.torch import TorchTrainer as T\nclass Mine(T): pass",
]


@pytest.mark.parametrize("lines", PLANTED)
def test_a_planted_trespass_is_found(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "session.py"
    shutil.copy(HOUSE / "launch" / "on_ray" / "session.py", path)
    assert list(trespasses(path)) == []
    with path.open("a") as file:
        file.write(f"\n\n{lines}\n")
    assert list(trespasses(path))


def test_what_is_documented_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "grid.py"
    path.write_text(
        "import ray.train\nfrom ray import tune\nclass Watch(tune.Callback): pass\nclass Told(ray.train.UserCallback): "
        "pass\nray.init(address='auto')\nray.__version__\ngetattr(ray.train, 'get_preemption_info', None)\n"
    )
    assert list(trespasses(path)) == []
