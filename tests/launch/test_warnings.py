"""Settings that a run does not use are named on the screen, in its log and in run.json."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from rayexp.config import ExperimentConfig, parse
from rayexp.launch.driver import outline, run

Tiny = Callable[..., ExperimentConfig]


def shown(text: io.StringIO) -> list[str]:
    lines = (line for line in text.getvalue().splitlines() if line.startswith("warning: "))
    return [line.removeprefix("warning: ") for line in lines]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"precision": "tf32"}, ["precision: tf32 is a format of NVIDIA GPUs: on this CPU it is fp32"]),
        ({"compile": True, "reduction": "ddp"}, ["compile: on a CPU nothing is compiled"]),
        (
            {"compile": True, "reduction": "ddp", "schedule": {"gamma": 0.5}},
            [
                "schedule.gamma is for step and plateau, schedule.name is constant: not used",
                "compile: on a CPU nothing is compiled",
            ],
        ),
    ],
)
def test_what_a_cpu_does_not_do(tiny: Tiny, changes: dict[str, Any], expected: list[str]) -> None:
    text = io.StringIO()
    changes["scaling"] = {"use_gpu": False}
    made = run(tiny(epochs=1, **changes), argv=[], console=Console(file=text, width=300))
    assert shown(text) == expected
    assert json.loads(made.meta_path.read_text())["warnings"] == expected
    log = (made.logs / "rank_0.log").read_text()
    assert all(line in log for line in expected)
    assert outline(tiny(**changes))["warnings"] == expected


@pytest.mark.parametrize(("batch", "warned"), [(64, False), (66, True)])
def test_a_batch_above_the_images(tiny: Tiny, tiny_images: dict[str, Any], batch: int, warned: bool) -> None:
    tree = tiny().model_dump(mode="json")
    for key in ("data", "model", "optimizer", "workload"):
        del tree[key]
    tree |= tiny_images | {"epochs": 1, "batch_size": batch, "model": {"name": "squeezenet1_0"}}
    text = io.StringIO()
    made = run(parse(tree, ExperimentConfig, ""), argv=[], console=Console(file=text, width=300))
    expected = ["batch_size: 66 is above the 64 training images: every step takes all of them"] if warned else []
    assert shown(text) == made.meta()["warnings"] == expected
    assert made.meta()["steps_per_epoch"] == 1


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_validation_loss_that_makes_no_sense_is_explained(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """On the screen, in the log and in run.json, also where the run is over before the screen looks again."""
    monkeypatch.setattr("rayexp.engine.diagnosis.ABSURD", 0.0)
    text = io.StringIO()
    made = run(tiny(epochs=epochs), argv=[], console=Console(file=text, width=300))
    lines = shown(text)
    assert [line.partition(" is ")[0] for line in lines] == [f"val_loss of epoch {e + 1}" for e in range(epochs)]
    assert "training diverges" in lines[0]  # an LSTM has no running statistics
    assert made.meta()["warnings"] == lines
    log = (made.logs / "rank_0.log").read_text()
    assert all(line in log for line in lines)


def test_the_reason_is_taken_from_the_models_batch_norms(
    tiny: Tiny, tiny_images: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayexp.engine.diagnosis.ABSURD", 0.0)
    tree = tiny().model_dump(mode="json")
    for key in ("data", "model", "optimizer", "workload"):
        del tree[key]
    tree |= tiny_images | {"epochs": 1, "model": {"name": "resnet18"}, "batch_size": 32}
    made = run(parse(tree, ExperimentConfig, ""), argv=[])
    (line,) = made.meta()["warnings"]
    assert "running statistics, and 81 % of them are still their initial values after 2 steps" in line


def test_a_graph_that_cannot_be_drawn_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayexp.runs.tensorboard.graph_events", lambda model, example: (b"", "RuntimeError: no"))
    text = io.StringIO()
    made = run(tiny(epochs=1), argv=[], console=Console(file=text, width=300))
    assert shown(text) == ["TensorBoard has no graph of this model: it cannot be traced (RuntimeError: no)"]
    assert not list(made.tb.glob("*.graph"))
