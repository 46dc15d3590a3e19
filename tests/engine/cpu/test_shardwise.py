"""Shards that go through the model together: the same bits as one by one, or they do not go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import checkpoint, passes
from rayexp.engine.batch_norm import per_shard
from rayexp.engine.cpu import shardwise
from rayexp.engine.inputs import StepInputs
from rayexp.engine.reduction import Forest, total
from rayexp.engine.rng import Draws, seeded
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.system.threads import replicas, threads_per_shard

Open = Callable[[ExperimentConfig], Trainer]


def config(model: str, **changes: Any) -> ExperimentConfig:
    tree = {
        "data": {"name": "shapes", "max_train_samples": 58, "max_val_samples": 20},
        "model": {"name": model},
        "batch_size": 32,
        "shards": 8,
        "lr": 0.01,
        "scaling": {"lanes": 1},
    }
    return parse({**tree, **changes}, ExperimentConfig, "test")


def shas(session: Trainer) -> list[str]:
    """state_sha after each step of an epoch, whose last batch has shards of two sizes."""
    return [checkpoint.sha(session.state().tensors) for e in session.train() if isinstance(e, StepDone)]


@pytest.mark.parametrize(
    "model",
    [
        *("resnet18", "squeezenet1_1", "shufflenet_v2_x0_5"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("efficientnet_b0", "regnet_y_400mf")),
    ],
)
def test_together_or_one_by_one(session: Open, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    together = session(config(model, epochs=1))
    found = shas(together)
    alike = all(together.stepper.passes.tried.values())  # else pairs are tried too
    assert {len(sizes) for sizes in together.stepper.passes.tried} == ({4} if alike else {4, 2})
    assert len(together.stepper.passes.tried) > 1
    monkeypatch.setattr(passes, "TOGETHER", 0)
    assert shas(session(config(model, epochs=1))) == found


@pytest.mark.parametrize(
    ("cores", "threads", "side_by_side", "together"), [(2, 1, 2, 4), (4, 1, 4, 2), (8, 1, 8, 1), (16, 2, 8, 1)]
)
def test_how_many_shards_a_pass_there_are_on_so_many_cores(
    session: Open, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, side_by_side: int, together: int
) -> None:
    """Eight shards: where there is a core for each of them, they have nothing to go together with."""
    assert (threads_per_shard(cores, 8), replicas(cores, threads, 8)) == (threads, side_by_side)
    one = session(config("squeezenet1_1", scaling={"lanes": side_by_side}))
    monkeypatch.setattr(passes.Passes, "_alike", lambda *args: True)
    here = one.stepper.passes
    inputs = StepInputs(here.shards, (4,) * 8, torch.device("cpu"), 0, static=False)
    runs = [run for number in range(side_by_side) for run in here._runs(number, inputs)]
    assert [list(shards) for _, each in runs for shards in each] == [
        list(range(at, at + together)) for at in range(0, 8, together)
    ]


def test_a_kernel_that_minds_the_batch_is_found_out(session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    true = torch.nn.functional.conv2d

    def minds(x: Tensor, *args: Any) -> Tensor:
        return true(x, *args) * (1 + 1e-6 * len(x))

    monkeypatch.setattr(shardwise.F, "conv2d", minds)
    minding = session(config("squeezenet1_1", epochs=1))
    found = shas(minding)
    assert minding.stepper.passes.tried
    assert not any(minding.stepper.passes.tried.values())
    monkeypatch.setattr(passes, "TOGETHER", 0)
    assert shas(session(config("squeezenet1_1", epochs=1))) == found


def test_layers_are_what_they_were() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=4, dilation=2),
        nn.Flatten(),
    )
    plain.append(nn.Linear(8 * 12 * 12, 5))
    apart, draws = nn.Sequential(*plain), Draws()
    x, sizes = torch.randn(7, 3, 32, 32), [3, 4]
    expected: dict[str, Tensor] = {}
    for part in x.split(sizes):
        plain(part).square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        expected[name], parameter.grad = parameter.grad, None
    assert shardwise.can_keep_apart(apart)
    per_shard(apart, draws)
    shardwise.keep_gradients_apart(apart, draws)
    draws.begin(seeded([0, 1], x.device), sizes)
    apart(x).square().sum().backward()
    for name, parameter in apart.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-4), name


def test_a_linear_layers_gradients_are_added_shard_by_shard() -> None:
    torch.manual_seed(0)
    layer, draws, sizes = nn.Sequential(nn.Linear(64, 50)), Draws(), (11, 12, 13)
    x, weight = torch.randn(36, 64), torch.randn(36, 50)
    shardwise.keep_gradients_apart(layer, draws)

    def gradients(x: Tensor, weight: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        draws.begin(seeded(range(len(sizes)), x.device), sizes)
        return torch.autograd.grad((layer(x) * weight).sum(), list(layer.parameters()))

    shards = zip(x.split(sizes), weight.split(sizes), sizes, strict=True)
    one_by_one = zip(*(gradients(*shard) for shard in shards), strict=True)
    for found, parts in zip(gradients(x, weight, *sizes), one_by_one, strict=True):
        assert torch.equal(found, total(iter(parts)))


def test_what_cannot() -> None:
    assert shardwise.can_keep_apart(models.mobilenet_v3_small())
    assert not shardwise.can_keep_apart(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
    assert not shardwise.can_keep_apart(nn.Sequential(nn.Conv2d(3, 4, 3, padding="same")))
    assert not shardwise.can_keep_apart(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")))
    assert not shardwise.can_keep_apart(nn.TransformerEncoderLayer(8, 2, 16))


class Doubled(nn.Conv2d):
    """A layer that is more than its base."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_keeps_its_own_forward() -> None:
    model, draws, x = nn.Sequential(Doubled(3, 4, 3)), Draws(), torch.randn(2, 3, 8, 8)
    wanted = model(x)
    assert not shardwise.can_keep_apart(model)
    shardwise.keep_gradients_apart(model, draws)
    draws.begin(seeded([0], x.device), [2])
    assert torch.equal(model(x), wanted)


@given(st.integers(1, 40))
@settings(deadline=None)
def test_total_is_the_tree(count: int) -> None:
    leaves = [torch.randn(3, generator=torch.Generator().manual_seed(i)) * 10.0 ** (i % 7) for i in range(count)]
    forest = Forest[Tensor](count, lambda left, right: left.add_(right))
    for i, leaf in enumerate(leaves):
        forest.push((0, i), leaf.clone())
    assert torch.equal(total(leaf.clone() for leaf in leaves), forest.root())
