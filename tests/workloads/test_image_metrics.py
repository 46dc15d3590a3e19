"""What is said of validation images against NumPy: the likeliest five, confidences, losses, accuracies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, parse
from rayexp.workloads.image_classification.workload import ImageClassification

CPU = torch.device("cpu")


class Fixed(nn.Module):
    """Says these logits, batch after batch."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.at = 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.logits[self.at : self.at + len(x)]
        self.at += len(x)
        return out


def predicted(logits: Tensor) -> tuple[ImageClassification, dict[str, np.ndarray]]:
    data = {"name": "shapes", "max_train_samples": 64, "max_val_samples": 40}
    work = ImageClassification(parse({"data": data, "batch_size": 16, "shards": 4}, ExperimentConfig, "test"))
    model = Fixed(logits)
    found = work.predictions([work.predict(model, s, CPU) for s in range(work.val_streams())])
    return work, {**found.arrays, "metrics": work.metrics(found)}


def test_predictions_are_numpy_s() -> None:
    logits = torch.randn(40, 20, generator=torch.Generator().manual_seed(0)) * 3
    work, found = predicted(logits)
    label = np.array(work.data.val.labels[np.arange(40)])
    x = logits.double().numpy()
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    wanted = np.argsort(-x, axis=1)[:, :5]
    assert np.array_equal(found["top5"], wanted)
    assert np.array_equal(found["label"], label)
    assert found["index"].tolist() == list(range(40))
    np.testing.assert_allclose(found["confidence"], p.max(1), rtol=1e-5)
    np.testing.assert_allclose(found["loss"], -np.log(p[np.arange(40), label]), rtol=1e-5)
    metrics = found["metrics"]
    assert metrics["acc1"] == pytest.approx(100 * np.mean(wanted[:, 0] == label))
    assert metrics["acc5"] == pytest.approx(100 * np.mean([k in row for k, row in zip(label, wanted, strict=True)]))
    assert metrics["acc1"] < metrics["acc5"]
    assert metrics["val_loss"] == pytest.approx(-np.log(p[np.arange(40), label]).mean(), rel=1e-6)


def test_of_equal_logits_the_lower_class_comes_first() -> None:
    logits = torch.zeros(40, 20)
    logits[:, [17, 3, 9]] = 1.0
    _, found = predicted(logits)
    assert (found["top5"] == [3, 9, 17, 0, 1]).all()


def test_the_example_is_one_black_image() -> None:
    work, _ = predicted(torch.zeros(40, 20))
    (image,) = work.example()
    assert image.shape == (1, 3, 64, 64)
    assert not image.any()
