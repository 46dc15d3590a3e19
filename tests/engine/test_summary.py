from __future__ import annotations

import pytest

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.summary import Layer, layers
from rayexp.workloads import open_workload


def table(name: str, **data: object) -> list[Layer]:
    tree = {"data": {"name": "shapes", "max_train_samples": 64, "max_val_samples": 64, **data}, "model": {"name": name}}
    return layers(open_workload(parse(tree, ExperimentConfig, "test")))


def test_resnet18_at_64_pixels() -> None:
    found = {layer.name: layer for layer in table("resnet18")}
    sizes = {"maxpool": "16x16x64", "layer1": "16x16x64", "layer2": "8x8x128", "layer3": "4x4x256", "layer4": "2x2x512"}
    assert {name: found[name].output for name in sizes} == sizes
    assert (found["avgpool"].output, found["fc"].output) == ("1x1x512", "20")
    assert found["layer1"].kind == "Sequential (conv2_x)"
    # 3 x 7 x 7 weights for each of 64 channels at 32 x 32 places; a multiply-add counts as two.
    assert (found["conv1"].parameters, found["conv1"].flops) == (9408, 2 * 9408 * 32 * 32)
    # torchvision's 11,689,512 of ResNet-18 with 1000 classes, less the 980 classes that are not here.
    assert found[""].parameters == 11_689_512 - 980 * 513
    assert found[""].flops == sum(layer.flops for layer in found.values() if layer.depth == 1)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "mobilenet_v3_small", "googlenet", "densenet121"])
def test_any_model_of_torchvision(name: str) -> None:
    *_, last = [layer for layer in table(name) if layer.depth == 1]
    assert last.output == "20"


def test_swins_maps_read_height_width_channels() -> None:
    assert next(layer for layer in table("swin_t") if layer.name == "features").output == "2x2x768"


@pytest.mark.parametrize(("name", "gates"), [("lstm", 4), ("gru", 3), ("rnn_tanh", 1)])
def test_a_language_model(name: str, gates: int) -> None:
    tree = {
        "workload": "language_model",
        "data": {"name": "python_docs", "max_train_tokens": 3000, "max_val_tokens": 600, "bptt": 20},
        "model": {"name": name, "emsize": 16, "nhid": 24, "nlayers": 1},
        "batch_size": 16,
    }
    found = {layer.name: layer for layer in layers(open_workload(parse(tree, ExperimentConfig, "test")))}
    assert found["body.layers.0"].output == "20x24"
    assert found["body.layers.0"].flops == 20 * 2 * gates * 24 * (16 + 24)
    assert found["body.layers.0"].depth == 2
