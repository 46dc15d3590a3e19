"""How a worker words what ends its training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.trainer import Trainer
from rayexp.errors import RunError, UserError
from rayexp.launch import driver
from rayexp.runs.run import Run


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
