"""`model.freeze`: against torch.optim with requires_grad=False, and what a frozen batch norm does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, ModelConfig, parse
from rayexp.engine.batch_norm import BATCH_NORMS
from rayexp.engine.freezing import FixedBatchNorm, fixed, freeze
from rayexp.engine.summary import layers
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.errors import UserError
from rayexp.workloads import open_workload

NORMS = ["*bn?.*", "*downsample.1.*"]
TREE: dict[str, Any] = {
    "data": {"name": "shapes", "max_train_samples": 32, "max_val_samples": 16, "image_size": 16},
    "batch_size": 16,
    "shards": 2,
    "lr": 0.05,
    "weight_decay": 0.01,
    "optimizer": {"momentum": 0.9, "clip": 0.5},
}
Session = Callable[[ExperimentConfig], Trainer]


def config(freeze: list[str], **changes: Any) -> ExperimentConfig:
    model = {"name": "resnet18", "stem": "small", "freeze": freeze, **changes.pop("model", {})}
    return parse({**TREE, "model": model, **changes}, ExperimentConfig, "test")


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def trained(trainer: Trainer, steps: int) -> None:
    events = (event for event in trainer.train() if isinstance(event, StepDone))
    for _ in range(steps):
        next(events)


def state(trainer: Trainer) -> Mapping[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.master.tensors(0).items()}


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize(("optimizer", "kernels"), [("sgd", True), ("sgd", False), ("adamw", True)])
def test_as_torch_optim_with_requires_grad_false(session: Session, optimizer: str, kernels: bool) -> None:
    """In float64, for two steps; clipping is in force and sees the trained parameters only. (AdamW's first steps are
    little more than the gradient's signs, so that rounding shows.)"""
    frozen = [*NORMS, "conv1.*", "layer1.*", "layer3.0.conv2.*"]
    made = config(frozen, cpu_kernels=kernels, optimizer={**TREE["optimizer"], "name": optimizer}, lr=0.01)
    trainer = session(made)
    workload = trainer.workload
    model = workload.model().double().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            not name.startswith(("conv1.", "layer1.", "layer3.0.conv2.")) and "bn" not in name and "e.1." not in name
        )
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.eval()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain: torch.optim.Optimizer = (
        torch.optim.SGD(learned, lr=made.lr, momentum=0.9, weight_decay=made.weight_decay)
        if optimizer == "sgd"
        else torch.optim.AdamW(learned, lr=made.lr, weight_decay=made.weight_decay)
    )
    before = state(trainer)
    for step in range(2):
        batch = workload.batch(1, step, range(2), torch.device("cpu"))
        plain.zero_grad()
        loss = F.cross_entropy(model(batch.inputs[0].double()), batch.targets)
        loss.backward()
        assert nn.utils.clip_grad_norm_(learned, 0.5) > 0.5
        plain.step()
    trained(trainer, 2)
    after = state(trainer)
    for name, expected in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        parameter = dict(model.named_parameters()).get(name)
        if parameter is None or not parameter.requires_grad:
            assert torch.equal(after[name], before[name]), name
        else:
            assert not torch.equal(after[name], before[name]), name
            moved, meant = after[name].double() - before[name].double(), expected - before[name].double()
            assert (moved - meant).norm() < (0.05 if optimizer == "adamw" else 2e-3) * meant.norm(), name


def test_frozen_parameters_are_in_no_buffer_and_in_every_checkpoint(session: Session) -> None:
    free, half = session(config([])), session(config(["layer*"]))
    assert half.layout.size < free.layout.size / 100
    assert half.stepper.exchange_bytes < free.stepper.exchange_bytes / 100
    saved = half.replicated().tensors
    assert {n for n in saved if n.startswith("model.")} == {
        n for n in free.replicated().tensors if n.startswith("model.")
    }
    assert not [name for name in saved if name.startswith("optimizer.") and ".layer" in name]


def test_replicas_and_evaluation_share_what_is_frozen(session: Session) -> None:
    trainer = session(config(["layer*"]))
    held = trainer.master.fixed
    assert "layer1.0.bn1.running_mean" in held
    models = [*trainer.eval_models, *(replica.model.module for replica in trainer.stepper.passes.replicas)]
    for model in models:
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        assert all(own[name] is tensor for name, tensor in held.items())
    changed = {name: tensor + 1 for name, tensor in trainer.master.tensors(0).items()}
    trainer.master.load(changed)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in held.items())


def test_a_checkpoint_brings_back_what_is_frozen(session: Session) -> None:
    """A run that began with weights of its own goes on with these, whatever the seed draws."""
    first = session(config(["layer*"]))
    with torch.no_grad():
        first.master.fixed["layer1.0.conv1.weight"].fill_(0.5)
    second = session(config(["layer*"], seed=7))
    second.load(first.state())
    assert torch.equal(second.master.fixed["layer1.0.conv1.weight"], first.master.fixed["layer1.0.conv1.weight"])
    assert {n: t.tolist() for n, t in second.master.fixed.items() if t.numel() < 100} == {
        n: t.tolist() for n, t in first.master.fixed.items() if t.numel() < 100
    }


def test_without_freeze_nothing_is_fixed(session: Session) -> None:
    trainer = session(config([]))
    assert trainer.master.fixed == {}
    assert not [m for m in trainer.master.model.modules() if isinstance(m, FixedBatchNorm)]


# ---------------------------------------------------------------------- batch norms


def test_a_frozen_batch_norm_keeps_its_statistics_and_normalises_by_them() -> None:
    model = net()
    with torch.no_grad():
        model[1].running_mean.fill_(0.3)
        model[1].running_var.fill_(2.0)
    names, x = list(model.state_dict()), torch.randn(4, 1, 3, 3)
    expected = model.eval()(x)
    freeze(model, ModelConfig(freeze=("1.*",)))
    assert list(model.state_dict()) == names
    assert isinstance(model[1], FixedBatchNorm)
    assert torch.equal(model.train()(x), expected)
    assert torch.equal(model.eval()(x), expected)
    assert model[1].running_mean.tolist() == pytest.approx([0.3, 0.3])
    assert {name for name, _ in fixed(model)} == {
        "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "statistics"), [(["1.weight"], True), (["0.*"], True), (["1.*"], False), (["3.*"], True)]
)
def test_any_other_batch_norm_follows_the_batches(patterns: list[str], statistics: bool) -> None:
    model = net().train()
    freeze(model, ModelConfig(freeze=tuple(patterns), freeze_statistics=statistics))
    assert type(model[1]) is nn.BatchNorm2d
    model(torch.ones(4, 1, 3, 3))
    assert model[1].running_mean.abs().sum() > 0


def test_a_batch_norm_with_two_names_stays_one() -> None:
    model = net()
    model.add_module("again", model[1])
    freeze(model, ModelConfig(freeze=("1.*",)))
    assert model.get_submodule("again") is model[1]
    assert isinstance(model[1], FixedBatchNorm)


@pytest.mark.parametrize("statistics", [True, False])
def test_the_statistics_in_training(session: Session, statistics: bool) -> None:
    trainer = session(config(["bn1.*", "layer*"], model={"freeze_statistics": statistics}))
    before = state(trainer)
    trained(trainer, 1)
    after = state(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name]) and "running" in name}
    assert moved == (set() if statistics else {name for name in before if "running" in name})
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    assert torch.equal(before["layer1.0.bn1.weight"], after["layer1.0.bn1.weight"])


# ---------------------------------------------------------------------- patterns


def test_patterns_are_those_of_a_shell() -> None:
    model = net()
    freeze(model, ModelConfig(freeze=("[01].*",)))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["3.weight", "3.bias"]


def test_a_tied_parameter_is_frozen_under_either_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    freeze(model, ModelConfig(freeze=("b.weight",)))
    assert not model["a"].weight.requires_grad
    assert model["a"].bias.requires_grad


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("layer1", r"'layer1' matches no parameter \(did you mean layer1\.\*\?\)$"),
        ("layr1.*", r"'layr1\.\*' matches no parameter \(did you mean layer1\.\*\?\)$"),
        ("fc.wieght", r"'fc\.wieght' matches no parameter \(did you mean fc\.weight\?\)$"),
        ("@@@", r"'@@@' matches no parameter; there are bn1, conv1, fc, layer1, layer2, layer3, layer4, each with"),
        ("FC.*", r"'FC\.\*' matches no parameter"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"^model.freeze: {meant}"):
        layers(open_workload(config([])), ModelConfig(freeze=("fc.bias", pattern)))


def test_something_must_be_left() -> None:
    with pytest.raises(UserError, match=r"^model\.freeze: \*\.weight, \* leaves no parameter to train$"):
        freeze(net(), ModelConfig(freeze=("*.weight", "*")))


def test_the_summary_counts_them() -> None:
    made = config(["layer*"])
    *inner, whole = layers(open_workload(made), made.model)
    assert whole.frozen == sum(layer.frozen for layer in inner if layer.depth == 1) > 10**7
    assert {layer.name: layer.frozen == layer.parameters for layer in inner if layer.depth == 1} | {"relu": True} == {
        "conv1": False, "bn1": False, "relu": True, "maxpool": True, "layer1": True, "layer2": True, "layer3": True,
        "layer4": True, "avgpool": True, "fc": False,
    }  # fmt: skip
    assert [layer.kind for layer in inner if layer.name == "layer1.0.bn1"] == ["FixedBatchNorm"]
