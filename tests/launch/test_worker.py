"""How a worker words what ends its training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.trainer import Trainer
from rayexp.errors import RunError, UserError
from rayexp.launch import driver
from rayexp.runs.run import Run
from rayexp.workloads.image_classification.workload import ImageClassification


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    data = {"name": "shapes", "max_train_samples": 16, "max_val_samples": 8}
    tree: dict[str, Any] = {"data": data, "batch_size": 8, "shards": 2, "epochs": 1, "storage_path": str(tmp_path)}
    return parse(tree, ExperimentConfig, "test")


def ends_with(error: Exception) -> Any:
    def train(*_: Any, **__: Any) -> Iterator[Any]:
        raise error
        yield

    return train


def test_too_little_memory_is_said_with_what_helps(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.06 GiB is "
        "free. Process 7 has 78.10 GiB memory in use. Of the allocated memory 77.2 GiB is allocated by PyTorch."
    )
    monkeypatch.setattr(Trainer, "train", ends_with(torch.OutOfMemoryError(text)))
    said = (
        "the memory of cpu is too small for this training (Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
        "79.18 GiB of which 1.06 GiB is free); a smaller batch_size, more shards or data.resident=false may help"
    )
    with pytest.raises(RunError) as raised:
        driver.run(config, argv=[])
    assert str(raised.value).startswith(said)
    (run,) = Run.all(Path(config.storage_path))
    assert (run.meta()["status"], run.meta()["error"].startswith(said)) == ("failed", True)


def test_an_operation_with_no_deterministic_kernel_is_named(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set ..."
    monkeypatch.setattr(Trainer, "train", ends_with(RuntimeError(text)))
    said = r"takes deterministic operations only, and adaptive_max_pool2d_backward_cuda has no such kernel for cpu"
    with pytest.raises(UserError, match=said):
        driver.run(config, argv=[])


def test_what_a_gpu_did_is_not_said_of_an_attempt_without_one(config: ExperimentConfig) -> None:
    run = driver.run(config, argv=[], max_steps=1)
    assert run.meta()["residency"] is run.meta()["capture"] is None
    run.update(capture="graph", residency={"kept": True, "bytes": 1, "free": 9, "asked": "auto"})
    driver.run(config, argv=[], resume=run)
    assert run.meta()["residency"] is run.meta()["capture"] is None


def test_what_cublas_was_not_told_in_time_is_said(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "this operation is not deterministic because it uses CuBLAS ... CUBLAS_WORKSPACE_CONFIG=:4096:8 or ..."
    monkeypatch.setattr(Trainer, "train", ends_with(RuntimeError(text)))
    with pytest.raises(UserError, match="exact needs CUBLAS_WORKSPACE_CONFIG=:4096:8 before a process's first product"):
        driver.run(config, argv=[])


class Refused(torch.autograd.Function):
    """Has a gradient that PyTorch refuses, as CUDA's kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("scale_backward does not have a deterministic implementation, but you set ...")


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Refused.apply(x)  # type: ignore[no-untyped-call,no-any-return]


@pytest.mark.parametrize(
    ("part", "where"), [("layer2.0.bn1", r"layer2\.0\.bn1\.1 \(Doubled\)"), ("", "the loss")], ids=["module", "loss"]
)
def test_the_module_is_named_whose_gradient_has_no_such_kernel(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch, part: str, where: str
) -> None:
    """Of one of torchvision's models, which is not tried before."""
    built, loss = ImageClassification.build, ImageClassification.loss

    def build(self: ImageClassification) -> nn.Module:
        model = built(self)
        if part:
            path, _, name = part.rpartition(".")
            setattr(model.get_submodule(path), name, nn.Sequential(model.get_submodule(part), Doubled()))
        return model

    def refused(self: ImageClassification, *args: Any) -> Any:
        value, state = loss(self, *args)
        return (value if part else Refused.apply(value)), state

    monkeypatch.setattr(ImageClassification, "build", build)
    monkeypatch.setattr(ImageClassification, "loss", refused)
    with pytest.raises(UserError, match=f"and scale_backward in {where} has no such kernel for cpu; allowed"):
        driver.run(config, argv=[])
    assert not list(Run.all(Path(config.storage_path)))
