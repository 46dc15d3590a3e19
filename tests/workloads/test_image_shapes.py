"""A model that cannot take the image size is refused before a run begins, and no other is."""

from __future__ import annotations

import pytest
import torch

from rayexp.config import ExperimentConfig, parse
from rayexp.errors import UserError
from rayexp.workloads import open_workload
from rayexp.workloads.image_classification import workload
from rayexp.workloads.image_classification.shapes import check_size
from rayexp.workloads.image_classification.workload import Options, build


def refusal(name: str, size: int, options: Options | None = None) -> str:
    """What is said of a model and a size; empty where nothing is."""
    try:
        check_size(lambda pixels: build(name, options or Options(), 3, pixels), name, size)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "size", "works"),
    [
        ("inception_v3", 64, 96),
        ("vgg11_bn", 16, 32),
        ("alexnet", 32, 64),
        ("vit_b_16", 60, 64),
        ("vit_h_14", 64, 224),
        ("maxvit_t", 64, 224),
        ("densenet121", 8, 32),
    ],
)
def test_a_size_that_a_model_cannot_take_is_refused_with_one_that_it_can(name: str, size: int, works: int) -> None:
    said = refusal(name, size)
    assert said.startswith(f"model.name: {name} takes no images of {size} px (")
    assert said.endswith(f"); it takes {works} px: data.image_size={works}")
    assert "\n" not in said
    assert refusal(name, works) == ""


@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_1", "resnet18"])
def test_the_verdict_is_that_of_a_real_pass(name: str) -> None:
    for size in (8, 20, 48):
        model = build(name, Options(), 3, size).train()
        try:
            model(torch.zeros(2, 3, size, size))
        except (ValueError, RuntimeError):
            assert refusal(name, size), size
        else:
            assert not refusal(name, size), size


@pytest.mark.parametrize(
    "name",
    ["convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
     "mobilenet_v2", "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5", "swin_t", "swin_v2_t", "vit_b_32"],
)  # fmt: skip
def test_no_family_is_refused_at_the_size_it_was_made_for(name: str) -> None:
    assert refusal(name, 224) == ""


def test_a_model_that_needs_values_is_left_to_the_run() -> None:
    assert refusal("regnet_y_400mf", 1) == ""  # torchvision reads tensors as it builds one


def test_wrong_options_are_said_as_such() -> None:
    assert refusal("alexnet", 8, Options(stem="small")).startswith("model.stem, model.zero_init_residual: only ResNets")


def test_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    assert refusal("alexnet", 32)
    assert refusal("resnet18", 32) == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.zeros(1).device.type == "cpu"


def test_it_is_refused_before_the_data_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "open_data", lambda config: pytest.fail("opened"))
    tree = {"data": {"name": "shapes", "image_size": 32}, "model": {"name": "alexnet"}}
    with pytest.raises(UserError, match="alexnet takes no images of 32 px"):
        open_workload(parse(tree, ExperimentConfig, "test"))
