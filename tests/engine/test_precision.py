"""`precision`: what is computed in bfloat16, what stays float32, and the switch of tf32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import runtime, settings
from rayexp.engine.cpu import blocked_loss
from rayexp.engine.optimizer import Optimizer
from rayexp.engine.rounding import of_products
from rayexp.engine.runtime import configure
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.workloads import open_workload

Open = Callable[[ExperimentConfig], Trainer]
IMAGES: dict[str, Any] = {
    "data": {"name": "shapes", "max_train_samples": 32, "max_val_samples": 20, "image_size": 32},
    "model": {"name": "mobilenet_v3_small"},
    "batch_size": 32,
    "shards": 4,
    "lr": 0.01,
    "scaling": {"lanes": 1},
}
TEXT: dict[str, Any] = {
    "workload": "language_model",
    "data": {"name": "python_docs", "max_train_tokens": 400, "max_val_tokens": 300, "bptt": 20},
    "batch_size": 8,
    "shards": 4,
    "lr": 0.01,
    "scaling": {"lanes": 1},
}
LSTM = {"name": "lstm", "emsize": 8, "nhid": 8, "nlayers": 2}
TRANSFORMER = {"name": "transformer", "emsize": 8, "nhid": 16, "nlayers": 1, "nhead": 2}


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    with settings.kept():
        yield


def config(tree: dict[str, Any], precision: str, **changes: Any) -> ExperimentConfig:
    return parse({**tree, "precision": precision, **changes}, ExperimentConfig, "test")


def watch(model: nn.Module, kind: type[nn.Module]) -> set[torch.dtype]:
    """The dtypes of what these layers give, filled as the model runs."""
    seen: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(
                lambda m, args, out: seen.add((out[0] if isinstance(out, tuple) else out).dtype)
            )
    return seen


@pytest.mark.parametrize(
    ("reduction", "precision", "wanted"),
    [
        ("exact", "fp32", torch.float32),
        ("exact", "tf32", torch.float32),
        ("exact", "bf16", torch.bfloat16),
        ("ddp", "bf16", torch.bfloat16),
    ],
)
def test_convolutions_compute_in_it(
    session: Open, monkeypatch: pytest.MonkeyPatch, reduction: str, precision: str, wanted: torch.dtype
) -> None:
    one = session(config(IMAGES, precision, reduction=reduction))
    trained = watch(one.stepper.passes.replicas[0].model.module, nn.Conv2d)
    evaluated = watch(one.eval_models[0], nn.Conv2d)
    buffers: list[Tensor] = []
    update = Optimizer.update
    monkeypatch.setattr(
        Optimizer, "update", lambda self, buffer, *args: (buffers.append(buffer), update(self, buffer, *args))
    )
    before = one.master.params.clone()
    *_, done = one.train()
    assert trained == evaluated == {wanted}
    assert {t.dtype for t in (one.master.params, one.master.stats, *one.optimizer.state.values(), *buffers)} == {
        torch.float32
    }
    assert one.stepper.passes.together == (precision == "fp32")
    # Weights move by less than bfloat16 can say: nothing of the master is rounded to it.
    moved = (one.master.params != before) & (one.master.params.bfloat16() == before.bfloat16())
    assert moved.any()
    assert done.predictions["loss"].dtype == "float32"  # type: ignore[union-attr]


def first_loss(one: Trainer) -> float:
    event = next(one.train())
    assert isinstance(event, StepDone)
    return event.loss


@pytest.mark.parametrize(
    "tree", [IMAGES, {**TEXT, "model": LSTM}, {**TEXT, "model": TRANSFORMER}], ids=["images", "lstm", "transformer"]
)
def test_bf16_is_another_rounding_of_the_same_mathematics(session: Open, tree: dict[str, Any]) -> None:
    wide, narrow = (first_loss(session(config(tree, p))) for p in ("fp32", "bf16"))
    assert wide != narrow
    assert narrow == pytest.approx(wide, rel=2e-2)


def test_a_language_model_in_bf16(session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wide products in bfloat16; the recurrent state, the losses and the gradients in float32."""
    seen: list[torch.dtype] = []
    true = blocked_loss.product
    monkeypatch.setattr(blocked_loss, "product", lambda a, b, *c: (seen.append(a.dtype), true(a, b, *c))[1])
    one = session(config({**TEXT, "model": LSTM}, "bf16"))
    layers = watch(one.stepper.passes.replicas[0].model.module, nn.LSTM)
    first_loss(one)
    assert set(seen) == {torch.bfloat16}
    assert layers == {torch.float32}
    assert {tensor.dtype for state in one.stepper.passes.recurrent_states.values() for tensor in state.values()} == {
        torch.float32
    }
    seen.clear()
    first_loss(session(config({**TEXT, "model": LSTM}, "fp32")))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_static_step_rounds_once(tied: bool) -> None:
    """Weights of which only products are made: a tied matrix holds word vectors, too, and recurrent layers compute
    in float32."""
    config = parse({**TEXT, "model": {**LSTM, "tied": tied}}, ExperimentConfig, "test")
    expected = {"decoder.bias"} if tied else {"decoder.weight", "decoder.bias"}
    assert of_products(open_workload(config).model()) == expected
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2, bias=False))
    assert of_products(conv) == {"0.weight", "0.bias", "3.weight"}


def test_a_transformer_in_bf16(session: Open) -> None:
    for precision, wanted in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        one = session(config({**TEXT, "model": TRANSFORMER}, precision))
        linear = watch(one.stepper.passes.replicas[0].model.module, nn.Linear)
        first_loss(one)
        assert linear == {wanted}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_tf32_is_asked_for_on_gpus_alone(precision: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class PinnedError(Exception):
        """Ends `configure` before it asks for a GPU."""

    def pin(tf32: bool) -> None:
        raise PinnedError(tf32)

    monkeypatch.setattr(runtime, "pin_precision", pin)
    with pytest.raises(PinnedError, match=str(precision == "tf32" and device == "cuda")):
        configure(config(IMAGES, precision), torch.device(device), 4)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_allowed_where_it_is_asked_for_and_nowhere_else(tf32: bool) -> None:
    for before in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before
        settings.pin_precision(tf32)
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
        assert torch.backends.cudnn.allow_tf32 == tf32
