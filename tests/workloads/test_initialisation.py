"""Where weights start: torchvision's own for the seed, the ranges that the language models' docstrings name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torchvision import models

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import order
from rayexp.workloads import open_workload
from rayexp.workloads.image_classification.workload import ImageClassification, Options, build


def images(name: str, seed: int = 0, **options: Any) -> ImageClassification:
    tree = {
        "data": {"name": "shapes", "max_train_samples": 64, "max_val_samples": 40},
        "model": {"name": name, **options},
        "seed": seed,
    }
    return ImageClassification(parse(tree, ExperimentConfig, "test"))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_a_model_starts_as_torchvision_starts_it(name: str) -> None:
    """With the generator seeded from (seed, "init"), and wherever the generator was before, which stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(order.key(3, "init"))
        wanted = models.get_model(name, num_classes=20).state_dict()
    for place in (1, 2):
        torch.manual_seed(place)
        before = torch.get_rng_state()
        found = images(name, seed=3).model().state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    other = images(name, seed=4).model().state_dict()
    assert not all(torch.equal(found[key], other[key]) for key in found)


def test_googlenet_is_initialised_too() -> None:
    """torchvision leaves its truncated normal out unless it is asked for it."""
    torch.manual_seed(0)
    found = build("googlenet", Options(), 7, 64)
    torch.manual_seed(0)
    wanted = models.googlenet(num_classes=7, aux_logits=False, init_weights=True)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))


def test_zero_init_residual_starts_every_branch_at_zero() -> None:
    for zero in (False, True):
        model = images("resnet18", zero_init_residual=zero).model()
        ends = [m.bn2.weight for m in model.modules() if isinstance(m, models.resnet.BasicBlock)]
        assert len(ends) == 8
        assert all(bool((end == (0 if zero else 1)).all()) for end in ends)


class Stem(models.ResNet):
    """torchvision's ResNet-18 with a 3x3 stem, drawn once and by torchvision's own loop over all convolutions."""

    def __init__(self, stride: int) -> None:
        super().__init__(models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=20)
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=stride, padding=1, bias=False)
        del self.maxpool
        self.maxpool = nn.Sequential()


@pytest.mark.parametrize(("stem", "stride"), [("small", 1), ("stride2", 2)])
def test_a_3x3_stem_is_torchvision_s_network_with_another_first_layer(stem: str, stride: int) -> None:
    wanted, found = Stem(stride), images("resnet18", stem=stem).model()
    assert {n: p.shape for n, p in found.state_dict().items()} == {n: p.shape for n, p in wanted.state_dict().items()}
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in wanted.parameters()) == 11_179_092
    wanted.load_state_dict(found.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(x), wanted.eval()(x), rtol=1e-4, atol=1e-5)
        side = 64 // stride
        assert found.layer1(found.maxpool(found.conv1(x))).shape == (2, 64, side, side)


@pytest.mark.parametrize("stem", ["small", "stride2"])
def test_a_3x3_stem_is_drawn_like_torchvision_s(stem: str) -> None:
    """He et al. 2015, fan out, for ReLU; after all that torchvision draws, from the same generator."""
    weight = images("resnet18", seed=3, stem=stem).model().conv1.weight.detach()
    assert stats.kstest(weight.numpy().reshape(-1) / math.sqrt(2 / (64 * 9)), "norm").pvalue > 1e-3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(order.key(3, "init"))
        models.resnet18(num_classes=20)
        again = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(again.weight, mode="fan_out", nonlinearity="relu")
    assert torch.equal(weight, again.weight)


def language(model: dict[str, Any], seed: int = 0) -> nn.Module:
    tree = {
        "workload": "language_model",
        "data": {"name": "python_docs", "max_train_tokens": 2000, "max_val_tokens": 500},
        "model": model,
        "batch_size": 8,
        "seed": seed,
    }
    return open_workload(parse(tree, ExperimentConfig, "test")).model()


RECURRENT = {"emsize": 24, "nhid": 36, "nlayers": 2}
TRANSFORMER = {"name": "transformer", "emsize": 24, "nhid": 40, "nlayers": 3, "nhead": 2, "tied": False}


@pytest.mark.parametrize(
    "model", [*({"name": n, **RECURRENT} for n in ("lstm", "gru", "rnn_tanh")), TRANSFORMER], ids=lambda m: m["name"]
)
def test_language_models_are_uniform_in_the_ranges_that_they_name(model: dict[str, Any]) -> None:
    """Recurrent: words and output in +-0.1 (word_language_model), the layers in +-1/sqrt(hidden) (PyTorch's own).
    Transformer: standard deviation 0.02, ends of residual branches 0.02/sqrt(2 blocks) (GPT-2)."""
    narrow = 0
    for name, parameter in language(model).named_parameters():
        values = parameter.detach().numpy().reshape(-1)
        if name == "decoder.bias":
            assert not values.any()
            continue
        if "norm" in name:
            assert (values == 1).all()
            continue
        if model["name"] != "transformer":
            limit = 0.1 if name in ("encoder.weight", "decoder.weight") else 1 / math.sqrt(36)
        else:
            ends = name.endswith(("attention_out.weight", "down.weight"))
            narrow += ends
            limit = math.sqrt(3) * 0.02 / (math.sqrt(2 * 3) if ends else 1)
        assert np.abs(values).max() <= limit * (1 + 1e-6), name
        assert stats.kstest(values, "uniform", (-limit, 2 * limit)).pvalue > 1e-4, name
    assert narrow == (6 if model["name"] == "transformer" else 0)


def test_each_parameter_draws_by_itself() -> None:
    """One more layer leaves the others where they start."""
    one, more = (dict(language({**TRANSFORMER, "nlayers": n}).named_parameters()) for n in (3, 4))
    names = [n for n, p in one.items() if p.ndim > 1 and not n.endswith(("attention_out.weight", "down.weight"))]
    assert all(torch.equal(one[name], more[name]) for name in names)
    assert not torch.equal(one["body.blocks.0.up.weight"], one["body.blocks.1.up.weight"])
    assert not torch.equal(one["encoder.weight"], language(TRANSFORMER, seed=1).encoder.weight)
