"""The plain script of a comparison: measured like a cell, and the same mathematics as the engine."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from rayexp.config import ExperimentConfig, parse
from rayexp.errors import UserError
from rayexp.grid import run as grid
from rayexp.runs.run import Run


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "workload": "language_model", "model": {"name": "gru", "emsize": 16, "nhid": 16, "nlayers": 1},
            "data": {"name": "python_docs", "max_train_tokens": 2000, "max_val_tokens": 500}, "batch_size": 4,
            "shards": 2, "lr": 1.0, "epochs": 2, "optimizer": {"name": "sgd", "momentum": 0, "clip": 0.25},
        },
        {
            "workload": "language_model",
            "model": {"name": "transformer", "emsize": 16, "nhid": 16, "nlayers": 1, "nhead": 2},
            "data": {"name": "python_docs", "max_train_tokens": 2000, "max_val_tokens": 500}, "batch_size": 4,
            "shards": 2, "lr": 0.1, "epochs": 2,
        },
    ],
    ids=["images", "text", "own-parts"],
)  # fmt: skip
def test_the_plain_script_is_measured_like_a_cell(tmp_path, tiny_images, changes):
    config = parse({**tiny_images, **changes, "name": "plain", "storage_path": str(tmp_path)}, ExperimentConfig, "x")
    run = grid.plain(config, "cpu", ["x"], time.monotonic(), "parent")
    assert run.meta()["status"] == "done"
    assert run.meta()["startup_seconds"]["to_first_step"] > 0
    assert run.meta()["unit"] == ("tokens" if changes else "images")
    records, steps = run.records(), run.steps()
    assert [r.epoch for r in records] == [1, 2]
    assert [line["first"] for line in steps] == [True, False]
    for record, line in zip(records, steps, strict=True):
        phases = [line[name] for name in ("data", "transfer", "compute", "optimizer")]
        assert [sum(parts) for parts in zip(*phases, strict=True)] == pytest.approx(line["total"], abs=1e-5)
        assert record.seconds["total"] >= sum(line["total"])
        assert math.isfinite(record.val_loss)
        assert record.busy is not None
        assert 0 < record.busy <= 1
        skip = int(line["first"])
        assert record.samples_per_second == pytest.approx(sum(line["count"][skip:]) / sum(line["total"][skip:]))
        assert ("first_step" in record.seconds) is line["first"]
    expected = 64 if not changes else (2000 // 4 - 1) * 4
    assert sum(steps[0]["count"]) == expected


def test_the_plain_script_s_failure_is_one_line(tmp_path, tiny_images):
    tree = {
        **tiny_images,
        "data": {"name": "folder", "root": str(tmp_path / "none")},
        "storage_path": str(tmp_path / "runs"),
    }
    config = parse(tree, ExperimentConfig, "x")
    with pytest.raises(grid.RunError, match="none"):
        grid.plain(config, "cpu", ["x"], time.monotonic(), "parent")
    (run,) = Run.all(tmp_path / "runs")
    assert run.meta()["status"] == "failed"


@pytest.mark.parametrize(
    ("asked", "device", "bf16", "expected"),
    [
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp32"),
        ("auto", "cpu", True, "fp32"),
        ("tf32", "cuda", True, "tf32"),
        ("fp32", "cuda", True, "fp32"),
        ("bf16", "cpu", False, "bf16"),
    ],
)
def test_the_plain_script_s_precision(monkeypatch, asked, device, bf16, expected):
    import torch

    from rayexp.grid.baseline import precision_of

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    config = parse({"precision": asked}, ExperimentConfig, "x")
    assert precision_of(config, torch.device(device)) == expected


def test_the_plain_script_steps_like_the_engine(tiny_images):
    """One step of the engine (one shard, so that batch norm sees the whole batch) and of the script, same weights."""
    import torch

    from rayexp.engine.group import WorkerGroup
    from rayexp.engine.runtime import configure
    from rayexp.engine.trainer import StepDone, Trainer
    from rayexp.grid.baseline import Images, optimizer_of
    from rayexp.workloads import open_workload

    words = {**tiny_images, "shards": 1, "reduction": "ddp", "weight_decay": 0.01}
    config = parse({**words, "data": {**tiny_images["data"], "augment": None}}, ExperimentConfig, "x")
    threads = torch.get_num_threads()
    try:
        device = torch.device("cpu")
        workload = open_workload(config)
        session = Trainer(config, workload, WorkerGroup(), configure(config, device, 1))
        script = Images(config, device)
        script.model.load_state_dict({n: t.clone() for n, t in session.master.tensors(0).items()})
        script.model.train()
        optimizer = optimizer_of(config, script.model)
        batch = workload.batch(1, 0, range(1), device)
        loss = script.loss((batch.inputs[0], batch.targets))
        loss.backward()
        optimizer.step()
        event = next(session.train())
        assert isinstance(event, StepDone)
        assert event.loss == pytest.approx(loss.item(), rel=1e-4)
        for name, parameter in script.model.named_parameters():
            ours = session.master.tensors(1)[name]
            assert torch.allclose(ours, parameter, rtol=1e-3, atol=2e-4), name
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def test_a_workload_without_a_script_trains_by_its_own_parts(tmp_path, monkeypatch):
    """The recurrent model has a script; without one, the loop takes the workload's own model, batches and loss."""
    import torch

    from rayexp.grid import baseline
    from rayexp.workloads import open_workload

    words = {
        "workload": "language_model", "model": {"name": "gru", "emsize": 8, "nhid": 8, "nlayers": 1, "dropout": 0.0},
        "data": {"name": "python_docs", "max_train_tokens": 600, "max_val_tokens": 200}, "batch_size": 4, "shards": 2,
        "lr": 0.5, "optimizer": {"name": "sgd", "momentum": 0.0},
    }  # fmt: skip
    config = parse(words, ExperimentConfig, "x")
    device = torch.device("cpu")
    monkeypatch.delitem(baseline.SCRIPTS, "language_model")
    script = baseline.script_of(config, device)
    assert isinstance(script, baseline.OwnParts)
    workload = open_workload(config)
    model = workload.model()
    optimizers = [baseline.optimizer_of(config, m) for m in (script.model, model)]
    state = workload.initial_state(4, device)
    seen = 0
    for step, batch in enumerate(script.batches()):
        on_device, count = script.moved(batch)
        total, state = workload.loss(model, workload.batch(1, step, range(2), device), state)
        losses = script.loss(on_device), total / count
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seen += count
    assert seen == (600 // 4 - 1) * 4
    assert step > 1  # the state was handed on
    for a, b in zip(script.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    script.model.eval()
    with torch.inference_mode():
        assert set(script.evaluate()) == {"val_loss", "ppl"}


@pytest.mark.slow
def test_a_grid_over_a_workload_of_one_s_own(tmp_path):
    """The shipped example: its unit, metrics and goals, its plain script, and what its predictions differ in."""
    from rayexp.config import CompareConfig
    from rayexp.grid import sentences, tables
    from rayexp.grid.comparison import Comparison
    from rayexp.grid.page import compare_page
    from rayexp.grid.plan import base_of, plan, with_overrides
    from rayexp.grid.report import read_report
    from rayexp.launch.placement import Node

    examples = Path(__file__).parents[2] / "examples"
    tree = {
        "base": str(examples / "own_workload.yaml"), "scaling": [{"num_workers": 0, "use_gpu": False}], "repeats": 2,
        "reduction": ["exact", "ddp"], "overrides": {"epochs": 2}, "storage_path": str(tmp_path / "runs"),
        "target": {"val_loss": 10.0},
    }  # fmt: skip
    config = parse(tree, CompareConfig, "grid")
    base = base_of(config, tmp_path).absolute()
    cells = plan(config, with_overrides(base, config.overrides), [Node("here", 2, 0)])
    assert [cell.skip for cell in cells] == [None] * 3
    made = Comparison.create(config, base, cells, {"argv": ["x"], "environment": grid.environment()})
    session = made.begin()
    for cell in cells:
        for repeat in (1, 2):
            row = grid.measure(made, cell, repeat)
            assert row.error is None
            made.add(row, session)
    report = read_report(made)
    assert report.unit == "samples"
    assert report.equal
    plain, exact, ddp = report.cells
    assert plain.measured.goals == exact.measured.goals
    assert exact.over_plain.freedom > 0  # whether its interval says anything depends on how busy the machine is
    assert ddp.differing is not None
    assert exact.target_seconds["val_loss"] == pytest.approx(exact.measured.repeats[0].elapsed()[0], rel=0.9)
    leading = next(iter(exact.measured.goals), "val_loss")
    assert any(name.startswith(f"{leading} at ") for name in tables.results(report)[0])
    assert "a loss that moved by more than a tenth of the median" in " ".join(compare_page(report).split())
    assert "samples per second" in sentences.markdown(report)
    wrong = config.model_copy(update={"target": {"acc1": 3.0}})
    with pytest.raises(UserError, match=r"has no metric 'acc1'.*allowed: .*val_loss, train_loss"):
        plan(wrong, base, [Node("here", 2, 0)])
