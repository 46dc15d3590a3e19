"""`rayexp check`, and the same check before the first step of a model that is not shipped."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.cli import main
from rayexp.config import ExperimentConfig, load
from rayexp.engine.contract.check import check as tried
from rayexp.errors import UserError
from rayexp.launch import contract
from rayexp.launch.check import check
from rayexp.launch.driver import run
from rayexp.runs.run import Run
from rayexp.workloads.image_classification.workload import ImageClassification

Tiny = Callable[..., ExperimentConfig]
IMAGES = {
    "workload": "image_classification",
    "data": {"name": "shapes", "max_train_samples": 32, "max_val_samples": 16, "image_size": 32},
    "model": {"name": "squeezenet1_1"},
    "batch_size": 16,
    "epochs": 1,
    "lr": 0.01,
    "optimizer": {},
}


class Own(nn.Module):
    """A classifier of the user's own."""

    def __init__(self, dropout: float = 0.0, spare: bool = False) -> None:
        super().__init__()
        self.dropout_share = dropout
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.head = nn.Linear(8, 20)
        if spare:
            self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        return self.head(F.dropout(x, self.dropout_share, self.training))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the image workload build a model of one's own."""

    def replace(**options: Any) -> None:
        def model(self: ImageClassification) -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return Own(**options)

        monkeypatch.setattr(ImageClassification, "model", model)

    return replace


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """`rayexp check` of a configuration: exit code, stdout, stderr."""

    def ask(config: ExperimentConfig, *words: str) -> tuple[int, str, str]:
        path = tmp_path / "config.yaml"
        path.write_text(config.to_yaml())
        monkeypatch.setattr(sys, "argv", ["rayexp", "check", str(path), *words])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code, *capsys.readouterr())

    return ask


def test_a_configuration_that_is_kept_ends_with_0(tiny: Tiny, typed: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = typed(tiny())
    assert (code, err) == (0, "")
    assert out.startswith("kept: lstm can be trained with reduction exact (tried: its structure, two builds, ")
    assert not (tmp_path / "runs").exists()


def test_what_is_refused_ends_with_1(tiny: Tiny, typed: Callable[..., Any], own: Callable[..., None]) -> None:
    own(dropout=0.3, spare=True)
    code, out, err = typed(tiny(**IMAGES))
    lines = out.splitlines()
    assert code == 1
    assert lines[0].startswith("model: the model (Own) draws from PyTorch's global generator, ")
    assert lines[-1].startswith("REFUSED with reduction exact: 1 breach (tried: ")
    assert err.startswith("warning: model: the parameter spare.weight gets no gradient")
    code, out, _ = typed(tiny(**IMAGES), "--json")
    found = json.loads(out)
    assert code == 1
    assert (found["ok"], found["reduction"]) == (False, "exact")
    assert [breach["module"] for breach in found["refused"]] == [""]
    (unused,) = found["warnings"]
    assert (unused["module"], unused["others"]) == ("spare.weight", ["spare.bias"])
    code, out, err = typed(tiny(**IMAGES), "reduction=ddp")
    assert code == 0
    assert "warning: model: the model (Own) draws from PyTorch's global generator" in err


def test_wrong_input_ends_with_2(tiny: Tiny, typed: Callable[..., Any]) -> None:
    code, out, err = typed(tiny(), "lr=-1")
    assert (code, out) == (2, "")
    assert "lr" in err


def test_a_model_of_ones_own_is_checked_before_its_first_step(
    tiny: Tiny, own: Callable[..., None], tmp_path: Path
) -> None:
    own(dropout=0.3)
    with pytest.raises(UserError, match=r"^model: the model \(Own\) draws from PyTorch's global generator"):
        run(tiny(**IMAGES), argv=[])
    assert Run.all(tmp_path / "runs") == []


def test_what_should_be_known_is_a_warning_of_the_run(tiny: Tiny, own: Callable[..., None]) -> None:
    own(spare=True)
    warnings = run(tiny(**IMAGES), argv=[]).meta()["warnings"]
    (unused,) = [warning for warning in warnings if "gets no gradient" in warning]
    assert "spare.weight" in unused
    assert "(likewise spare.bias)" in unused


def test_the_check_changes_no_bit_of_what_follows(
    tiny: Tiny, own: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    own()
    checked = run(tiny(**IMAGES), argv=[]).records()[-1].state_sha
    monkeypatch.setattr(contract, "is_shipped", lambda *_: True)
    assert run(tiny(**IMAGES), argv=[]).records()[-1].state_sha == checked


def test_shipped_models_and_resumed_runs_are_not_held_up(
    tiny: Tiny, own: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counting(config: ExperimentConfig, *rest: Any) -> Any:
        asked.append(config.model.name)
        return tried(config, *rest)

    monkeypatch.setattr(contract, "check", counting)
    run(tiny(epochs=1), argv=[])
    assert asked == []
    own()
    made = run(tiny(**IMAGES), argv=[])
    assert len(asked) == 1
    run(tiny(**{**IMAGES, "epochs": 2}), argv=[], resume=made)
    assert len(asked) == 1


def test_more_than_one_breach_is_counted(tiny: Tiny, own: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    own(dropout=0.3)
    found = check(tiny(**IMAGES))
    monkeypatch.setattr(type(found), "refused", property(lambda self: [*self.breaches, *self.breaches]))
    with pytest.raises(UserError, match=r"; and 1 more, which `rayexp check CONFIG` lists$"):
        run(tiny(**IMAGES), argv=[])


# ---------------------------------------------------------------------- as training begins with it


def test_frozen_parameters_are_frozen_in_the_check(
    tiny: Tiny, own: Callable[..., None], typed: Callable[..., Any]
) -> None:
    own(spare=True)
    code, _, err = typed(tiny(**IMAGES), "model.freeze=[spare.*]")
    assert (code, err) == (0, "")
    made = run(tiny(**{**IMAGES, "model": {"name": "squeezenet1_1", "freeze": ["spare.*"]}}), argv=[])
    assert not [warning for warning in made.meta()["warnings"] if "gradient" in warning]
    code, out, err = typed(tiny(**IMAGES), "model.freeze=[spar.*]")
    assert (code, out) == (2, "")
    assert "model.freeze: 'spar.*' matches no parameter" in err
    code, out, err = typed(tiny(**IMAGES), "model.freeze=['*']")
    assert (code, out) == (2, "")
    assert "model.freeze: * leaves no parameter to train" in err


def test_weights_are_read_and_fitted_in_the_check(
    tiny: Tiny, own: Callable[..., None], typed: Callable[..., Any], tmp_path: Path
) -> None:
    own()
    file = tmp_path / "own.pt"
    torch.save({**Own().state_dict(), "head.weight": torch.zeros(7, 8), "head.bias": torch.zeros(7)}, file)
    assert typed(tiny(**IMAGES), f"model.weights={file}")[0] == 0
    torch.save({**Own().state_dict(), "conv.weight": torch.zeros(3)}, file)
    code, out, err = typed(tiny(**IMAGES), f"model.weights={file}")
    assert (code, out) == (2, "")
    assert f"model.weights: {file} does not fit this model: conv.weight is 3 there and 8x3x8x8 here" in err
    code, out, err = typed(tiny(**IMAGES), f"model.weights={tmp_path / 'none.pt'}")
    assert (code, out) == (2, "")
    assert "none.pt: no such file" in err


def test_the_trials_compute_with_the_weights(
    tiny: Tiny, own: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own()
    file, seen = tmp_path / "own.pt", []
    weights = {name: torch.full_like(tensor, 0.25) for name, tensor in Own().state_dict().items()}
    torch.save(weights, file)

    def watched(self: Own, x: Tensor) -> Tensor:
        seen.append(float(self.head.bias.detach().float().sum()))
        return self.head(self.conv(x).relu().mean((2, 3)))

    monkeypatch.setattr(Own, "forward", watched)
    config = tiny(**{**IMAGES, "model": {"name": "squeezenet1_1", "weights": str(file)}})
    assert not check(config).refused
    assert set(seen) >= {5.0}
    assert all(abs(total - 5) < 0.1 for total in seen)  # one trial adds noise to the weights


# ---------------------------------------------------------------------- by reference

EXAMPLES = Path(__file__).parents[2] / "examples"
BAD = """
import torch.nn.functional as F
from own_model import SmallNet


class Dropping(SmallNet):
    def forward(self, images):
        return F.dropout(super().forward(images), 0.1, self.training)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the examples' code, and one that does what it must not."""
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.yaml")]:
        shutil.copy(path, folder)
    (folder / "bad.py").write_text(BAD)
    return folder


SMALL = ("data.max_train_samples=32", "data.max_val_samples=16", "model.width=2", "batch_size=16", "shards=2")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("own_model", SMALL, marks=pytest.mark.slow),
        ("own_workload", ("data.samples=64", "batch_size=16", "shards=2")),
    ],
)
def test_the_examples_keep_to_it(mine: Path, name: str, changes: tuple[str, ...]) -> None:
    found = check(load(mine / f"{name}.yaml", list(changes)))
    assert list(map(str, found.breaches)) == []
    assert len(found.checked) == 6


def test_a_reference_is_checked_by_the_command_and_before_the_first_step(mine: Path, tmp_path: Path) -> None:
    changes = [*SMALL, f"model.name={mine / 'bad.py'}:Dropping", f"storage_path={tmp_path / 'runs'}"]
    config = load(mine / "own_model.yaml", changes)
    line = r"^model: the model \(Dropping\) draws from PyTorch's global generator"
    (found,) = check(config).refused
    assert re.search(line, str(found))
    with pytest.raises(UserError, match=line):
        run(config, argv=[])
    assert Run.all(tmp_path / "runs") == []
