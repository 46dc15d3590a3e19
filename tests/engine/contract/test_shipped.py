"""The models that come with rayexp and torchvision keep the contract, and are known by their names."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.contract.breach import Contract
from rayexp.engine.contract.check import is_shipped
from rayexp.workloads import open_workload

Examined = Callable[[ExperimentConfig], Contract]


class Net(nn.Conv2d):
    """Of no package that is known."""


LANGUAGE = {
    "workload": "language_model",
    "data": {"name": "python_docs", "max_train_tokens": 3000, "max_val_tokens": 600, "bptt": 12},
    "batch_size": 16,
    "shards": 4,
}
SIZES = {"emsize": 8, "nhid": 8, "nlayers": 2, "dropout": 0.2}


@pytest.mark.parametrize("name", ["rnn_tanh", "rnn_relu", "lstm", "gru", "transformer"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_language_models_keep_to_it(examined: Examined, name: str, tied: bool) -> None:
    model = {"name": name, **SIZES, "tied": tied}
    if name == "transformer":
        model = {"name": name, "emsize": 16, "nhead": 2, "nhid": 16, "nlayers": 2, "tied": tied}
    found = examined(parse({**LANGUAGE, "model": model}, ExperimentConfig, "test"))
    assert list(map(str, found.breaches)) == []
    assert len(found.checked) == 6


FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet50",
    "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32",
    "wide_resnet50_2",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES),
    ],
)
def test_torchvisions_models_keep_to_it(examined: Examined, images: dict[str, Any], name: str) -> None:
    size = 96 if name == "inception_v3" else 64
    tree = {**images, "model": {"name": name}, "data": {**images["data"], "image_size": size}}
    found = examined(parse(tree, ExperimentConfig, "test"))
    assert list(map(str, found.breaches)) == []
    assert len(found.checked) == 6


def test_shipped_is_known_by_name_and_package(images: dict[str, Any]) -> None:
    config = parse({**images, "model": {"name": "squeezenet1_1"}}, ExperimentConfig, "test")
    workload = open_workload(config)
    assert is_shipped(config, workload, workload.model())
    assert not is_shipped(config, workload, Net(3, 20, 1))
    named = SimpleNamespace(model=SimpleNamespace(name="mine.py:make"))
    assert not is_shipped(named, workload, workload.model())  # type: ignore[arg-type]
    assert not is_shipped(config, SimpleNamespace(), workload.model())  # type: ignore[arg-type]
