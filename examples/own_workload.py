"""A workload of your own, a small regression: `workload: ./own_workload.py:Regression` in own_workload.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.config import ExperimentConfig
from rayexp.errors import UserError
from rayexp.runs.records import Predictions
from rayexp.workloads.samples import Samples, SampleWorkload


class Regression(SampleWorkload):
    """Learn y = sin(3 x1) + x2 x3 from noisy samples.

    Keys under `data`: `samples` for training (a quarter of that validates) and `noise`. Under `model`: `hidden`.
    """

    goals: Mapping[str, Any] = {"rmse": "min", "r2": "max"}  # the first decides which epoch is the best

    def __init__(self, config: ExperimentConfig) -> None:
        options = {"samples": 1024, "noise": 0.1, **config.data.options}
        if unknown := options.keys() - {"samples", "noise"}:
            raise UserError(f"data.{unknown.pop()}: unknown; allowed: samples, noise")
        self.hidden = int(config.model.options.get("hidden", 32))
        count, noise = int(options["samples"]), float(options["noise"])
        super().__init__(config, draw("train", count, noise), draw("val", count // 4, noise))

    def build(self) -> nn.Module:
        """A new model; its draws follow from the configuration's seed."""
        return nn.Sequential(nn.Linear(3, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The squared error of each sample."""
        return F.mse_loss(outputs[:, 0], targets, reduction="none")

    def columns(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """What is stored of each prediction beside its loss."""
        return {"output": outputs[:, 0].float(), "target": targets}

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """The root mean square error, and the share of the variance that is explained."""
        loss = super().metrics(predictions)["val_loss"]
        return {
            "val_loss": loss,
            "rmse": loss**0.5,
            "r2": 1 - loss / float(predictions["target"].var(dtype=np.float64)),
        }


def draw(split: str, count: int, noise: float) -> Samples:
    """The samples of a split: x [count, 3] and y [count]."""
    draws = np.random.default_rng({"train": 1, "val": 2}[split])
    x = draws.uniform(-1, 1, (count, 3)).astype(np.float32)
    y = np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2] + noise * draws.standard_normal(count)
    return Samples((x,), y.astype(np.float32), names=tuple(f"{split}-{i}" for i in range(count)))
