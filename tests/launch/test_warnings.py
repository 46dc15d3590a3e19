"""Settings that a run does not use are named on the screen, in its log and in run.json."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import runtime
from rayexp.engine.inputs import StepInputs
from rayexp.engine.passes import Passes
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


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs compute as on a GPU, with calls in the place of graphs."""
    true = runtime.configure
    monkeypatch.setattr(runtime, "configure", lambda *args, **options: true(*args, static=True, **options))


def short_of_memory(monkeypatch: pytest.MonkeyPatch, replica: int, step: int) -> None:
    """From that step on there is no memory for that replica."""
    true = Passes.compute

    def compute(passes: Passes, number: int, inputs: StepInputs, *args: Any) -> float:
        if number >= replica and float(inputs.done) >= step:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(passes, number, inputs, *args)

    monkeypatch.setattr(Passes, "compute", compute)


@pytest.mark.parametrize("step", [0, 1])
def test_lanes_that_the_memory_does_not_hold_are_said(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, static: None, step: int
) -> None:
    config = tiny(epochs=1, shards=4, scaling={"use_gpu": False, "lanes": 4}, cpu_kernels=False)
    whole = run(config, argv=[])
    assert (whole.meta()["lanes"], whole.meta()["capture"], whole.meta()["warnings"]) == (4, "graph", [])
    short_of_memory(monkeypatch, 1, step)
    text = io.StringIO()
    made = run(config, argv=[], console=Console(file=text, width=300))
    line = "scaling.lanes: the GPU's memory holds 1 of 4 replicas side by side; steps take longer than with all of them"
    assert shown(text) == made.meta()["warnings"] == [line]
    assert (made.meta()["lanes"], made.meta()["capture"]) == (1, "graph")
    assert line in (made.logs / "rank_0.log").read_text()
    assert made.records()[-1].weights_sha == whole.records()[-1].weights_sha


@pytest.mark.parametrize(("capture", "warned"), [("auto", True), (False, False)])
def test_steps_without_graphs_are_said(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, static: None, capture: object, warned: bool
) -> None:
    def graph(*args: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(runtime.Runtime, "graph", graph)
    text = io.StringIO()
    made = run(tiny(epochs=1, capture=capture), argv=[], console=Console(file=text, width=300))
    reason = "eager: operation not permitted when stream is capturing" if warned else "eager: capture is false"
    lines = [f"capture: steps run without CUDA graphs, which takes several times as long ({reason})"] * warned
    assert made.meta()["capture"] == reason
    assert shown(text) == made.meta()["warnings"] == lines
