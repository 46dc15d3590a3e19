"""Models and datasets of a program's own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import rayexp
from rayexp.errors import UserError
from rayexp.library.parts import reference
from rayexp.runs.run import Run

NETS = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


def wide(num_classes):
    return Tiny(num_classes, 9)
"""
FLOWERS = """
import numpy as np


class Flowers:
    classes = ("dark", "light")

    def __init__(self, split):
        self.draw = np.random.default_rng(len(split))

    def __len__(self):
        return 24

    def __getitem__(self, at):
        return np.full((20, 16, 3), 40 + 150 * (at % 2) + at, np.uint8), at % 2
"""
SMALL = {
    "data": {"image_size": 16, "max_train_samples": 40, "max_val_samples": 20},
    "batch_size": 8,
    "shards": 2,
    "lr": 0.01,
}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    """Write a module into a folder of the user's, and import it as a program there does."""
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def make(name: str, text: str) -> ModuleType:
        (folder / f"{name}.py").write_text(text)
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return make


def test_a_class_of_a_file_trains_and_its_run_opens_without_the_file(mine: Any, tmp_path: Path) -> None:
    nets, data = mine("tiny_nets", NETS), mine("tiny_flowers", FLOWERS)
    tree = {**SMALL, "data": {"image_size": 16}}
    kwargs: dict[str, Any] = {"model": nets.Tiny, "data": data.Flowers, "runs": tmp_path / "runs", "progress": False}
    run = rayexp.train(tree, {"model.width": 5, "name": "own"}, **kwargs)
    assert run.config().model.name == "tiny_nets.py:Tiny"
    assert run.config().data.name == "tiny_flowers.py:Flowers"
    for file in (tmp_path / "mine").glob("*.py"):
        file.unlink()
    model = rayexp.load_model(run)
    assert type(model).__name__ == "Tiny"
    assert model.conv.weight.shape[0] == 5  # type: ignore[union-attr]
    assert [name for _, name in model.about["categories"]] == ["dark", "light"]  # type: ignore[union-attr]
    stored = run.predictions(1)
    pictures = [np.full((20, 16, 3), 40 + 150 * (at % 2) + at, np.uint8) for at in range(24)]
    answers = rayexp.predict(run, pictures)
    assert [row.classes[0] for row in answers] == stored["top5"][:, 0].tolist()
    made = rayexp.export(run, tmp_path / "own.safetensors")
    assert made.about["architecture"] == "tiny_nets.py:Tiny"
    assert any("import Tiny" in line for line in made.build)


@pytest.mark.slow
def test_a_function_stands_for_its_name_and_overrides_are_kept(mine: Any, tmp_path: Path) -> None:
    nets = mine("wide_nets", NETS)
    run = rayexp.train(SMALL, {"epochs": 1}, model=nets.wide, runs=tmp_path / "runs", progress=False)
    assert rayexp.load_model(run).head.in_features == 9  # type: ignore[union-attr]
    again = rayexp.train(run.config(), runs=tmp_path / "runs", progress=False)
    assert again.records()[0].weights_sha == run.records()[0].weights_sha


def test_references_name_files_or_installed_modules(mine: Any, tmp_path: Path) -> None:
    from torchvision.models import resnet18

    nets = mine("named_nets", NETS)
    assert reference("model", nets.Tiny) == f"{tmp_path / 'mine' / 'named_nets.py'}:Tiny"
    assert reference("model", torch.nn.Linear) == "torch.nn.modules.linear:Linear"
    assert reference("model", resnet18).startswith("torchvision.models.resnet:")
    assert reference("model", "package.module:Net") == "package.module:Net"


def test_what_no_import_could_find_is_refused(mine: Any) -> None:
    nets = mine("other_nets", NETS)

    class Local(torch.nn.Module):
        pass

    for part, line in (
        (nets.Tiny(3), "model: expected a class or a function that makes one, got a Tiny"),
        (Local, "Local has no name that an import could find; define it at the top of a file"),
        (lambda num_classes: nets.Tiny(num_classes), "has no name that an import could find"),
    ):
        with pytest.raises(UserError, match=line):
            rayexp.train(SMALL, model=part, progress=False)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_class_of_the_script_trains_in_its_process_and_is_refused_for_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"{NETS}\n"
        "import rayexp\n"
        f"small = {SMALL!r}\n"
        "run = rayexp.train(small, model=Tiny, progress=False)\n"
        "print(run.status(), type(rayexp.load_model(run)) is Tiny)\n"
        "try:\n"
        "    rayexp.train(small, {'scaling.num_workers': 2}, model=Tiny)\n"
        "except rayexp.UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "done True"
    assert second.startswith(
        "model: Tiny is defined in this script or notebook, where workers cannot import it; put it"
    )
    assert len(Run.all(tmp_path / "runs")) == 1


@pytest.mark.slow
def test_the_model_of_an_own_workload_leaves_with_its_data_opened(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "own_workload.yaml"
    run = rayexp.train(example, {"epochs": 1}, runs=tmp_path / "runs", progress=False)
    model = rayexp.load_model(run)
    made = rayexp.export(run, tmp_path / "own.pt")
    weights = torch.load(tmp_path / "own.pt", weights_only=True)
    assert weights.keys() == model.state_dict().keys()
    assert made.about["weights_sha"] == run.records()[0].weights_sha
    assert made.about["input"].startswith("float32[2, ")
    with pytest.raises(UserError, match="predict answers for pictures and texts; this run is of"):
        rayexp.predict(run, np.zeros((4, 4), np.uint8))
