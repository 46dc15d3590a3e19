"""The model's graph is drawn from a copy, for models with attention as well."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import SwinTransformer, VisionTransformer

from rayexp.launch.saver import Saver
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter


class Written(RunWriter):
    """Keeps the graph."""

    events = b""

    def graph(self, events: bytes) -> None:
        self.events = events


MODELS = {
    "vit": lambda: VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10),
    "swin": lambda: SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=10),
    "norm": lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_of_a_model_is_drawn(tmp_path, name: str) -> None:
    writer = Written(Run(tmp_path))
    saver = Saver(writer, {})
    model = MODELS[name]().train()
    failed: list[str] = []
    saver.graph(model, (torch.zeros(2, 3, 32, 32),), failed.append)
    saver.wait()
    saver.close()
    assert failed == []
    assert len(writer.events) > 1000
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert next(model.parameters()).grad is None


def test_what_cannot_be_traced_is_said(tmp_path) -> None:
    saver = Saver(writer := Written(Run(tmp_path)), {})
    failed: list[str] = []
    saver.graph(torch.nn.Linear(2, 3), (torch.zeros(1, 5),), failed.append)
    saver.wait()
    saver.close()
    assert writer.events == b""
    (line,) = failed
    assert line.startswith("TensorBoard has no graph of this model: it cannot be traced (RuntimeError: ")
    assert "mat1 and mat2 shapes cannot be multiplied" in line
