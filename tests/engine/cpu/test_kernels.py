"""`cpu_kernels: false`: none of engine/cpu is used, the mathematics and `exact` stay, and a resume keeps it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import checkpoint, cpu
from rayexp.engine.replica import fixed_weights
from rayexp.engine.rng import seeded
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.runs.integrity import changes

Open = Callable[[ExperimentConfig], Trainer]
PARTS = (
    "keep_gradients_apart", "use_small_map_convolutions", "pool_before_relu", "blocked_cross_entropy",
    "blocked_embedding", "keep_freed_memory",
)  # fmt: skip
TREES: dict[str, dict[str, Any]] = {
    "resnet": {  # its last maps are 2x2 and 1x1
        "data": {"name": "shapes", "max_train_samples": 32, "max_val_samples": 20, "image_size": 32},
        "model": {"name": "resnet18"},
        "batch_size": 16,
        "shards": 4,
        "lr": 0.01,
        "optimizer": {"momentum": 0},
    },
    "lstm": {
        "workload": "language_model",
        "data": {"name": "python_docs", "max_train_tokens": 500, "max_val_tokens": 300, "bptt": 20},
        "model": {"name": "lstm", "emsize": 16, "nhid": 16, "nlayers": 1},
        "batch_size": 8,
        "shards": 4,
        "lr": 1.0,
        "optimizer": {"momentum": 0},
    },
}


def config(name: str, **changes: Any) -> ExperimentConfig:
    return parse({**TREES[name], **changes}, ExperimentConfig, "test")


def one_step(session: Trainer) -> tuple[float, Tensor, str]:
    """The loss, how far the weights moved, and the hash of the state."""
    before = session.master.params.clone()
    event = next(session.train())
    assert isinstance(event, StepDone)
    return event.loss, session.master.params - before, checkpoint.sha(session.state().tensors)


@pytest.mark.parametrize("name", list(TREES))
@pytest.mark.parametrize("reduction", ["exact", "ddp"])
def test_off_is_the_same_mathematics(session: Open, monkeypatch: pytest.MonkeyPatch, name: str, reduction: str) -> None:
    """After one step of gradients of plain SGD, and with no part of engine/cpu."""
    used: set[str] = set()

    def counted(part: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            used.add(part)
            return true(*args)

        return call

    for part in PARTS:
        monkeypatch.setattr(cpu, part, counted(part, getattr(cpu, part)))
    loss, moved, _ = one_step(session(config(name, reduction=reduction)))
    expected = {"keep_freed_memory", "use_small_map_convolutions", "pool_before_relu"}
    if name == "lstm":
        expected |= {"blocked_cross_entropy", "blocked_embedding"}
    elif reduction == "exact":
        expected |= {"keep_gradients_apart"}
    assert used == expected
    used.clear()
    plain = session(config(name, reduction=reduction, cpu_kernels=False))
    assert not plain.stepper.passes.together
    plain_loss, plain_moved, _ = one_step(plain)
    assert not used
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert moved.norm() > 0
    assert (moved - plain_moved).norm() < 1e-3 * plain_moved.norm()


@pytest.mark.parametrize("name", list(TREES))
def test_off_is_exact_too(session: Open, name: str) -> None:
    off = [config(name, cpu_kernels=False, scaling={"lanes": lanes}) for lanes in (1, 2, 3)]
    found = {one_step(session(one))[2] for one in off}
    assert len(found) == 1


def test_a_replicas_module_is_right_outside_of_the_engine_too(session: Open) -> None:
    """What follows from the weights is kept while they stay, and neither after a step nor after one that failed."""
    trainer = session(config("resnet"))
    conv = trainer.stepper.passes.replicas[0].model.module.layer4[1].conv1
    x = torch.randn(2, 512, 1, 1)

    def right() -> bool:
        conv.forward.draws.begin(seeded([0], x.device), [2])
        out = conv(x)
        assert type(out.grad_fn).__name__ == "_SmallMapBackward"
        return torch.allclose(out, F.conv2d(x, conv.weight, padding=1), atol=1e-5)

    for _ in zip(range(2), trainer.train(), strict=False):
        assert right()
    for error in (None, RuntimeError):
        with contextlib.suppress(RuntimeError), fixed_weights(trainer.stepper.passes.replicas, trainer.runtime):
            assert right()
            trainer.master.params.mul_(2)
            assert not right()
            if error:
                raise error
        assert right()


def test_a_resume_keeps_it_and_a_run_of_before_has_it() -> None:
    before = config("lstm").model_dump(mode="json")
    del before["cpu_kernels"]
    old = parse(before, ExperimentConfig, "config.yaml")
    assert changes(old, config("lstm", cpu_kernels=True)) == ""
    assert changes(old, config("lstm", cpu_kernels=False)) == "cpu_kernels True -> False"


class OnGPU(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_a_gpu_takes_the_whole_vocabulary_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("blocked_cross_entropy", "blocked_embedding"):
        monkeypatch.setattr(cpu, part, None)
    weight, bias, tokens = torch.randn(5000, 8), torch.randn(5000), torch.randint(5000, (6,))
    vectors = cpu.embedding(tokens, weight.as_subclass(OnGPU), True)
    assert torch.equal(vectors, F.embedding(tokens, weight))
    losses = cpu.token_losses(vectors.as_subclass(OnGPU), weight, bias, tokens, True)
    assert torch.equal(losses, F.cross_entropy(F.linear(vectors, weight, bias), tokens, reduction="none"))
    with pytest.raises(TypeError):
        cpu.embedding(tokens, weight, True)
