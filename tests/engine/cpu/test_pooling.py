"""A ResNet's stem that pools before it rectifies: the same bits."""

from __future__ import annotations

import copy

import torch
import torchvision
from torch import nn

from rayexp.engine.cpu.pooling import MaxPoolReLU, pool_before_relu


def test_pooling_first_changes_no_bit() -> None:
    torch.manual_seed(1)
    plain = torchvision.models.resnet18(num_classes=7)
    swapped = copy.deepcopy(plain)
    pool_before_relu(swapped)
    assert isinstance(swapped.maxpool, MaxPoolReLU)
    x = torch.randn(4, 3, 64, 64)
    x[0, :, :32] = 0  # equal pixels: which of them is the largest must not matter
    outputs = [model(x) for model in (plain, swapped)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), swapped.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert list(plain.state_dict()) == list(swapped.state_dict())


class Again(torchvision.models.ResNet):
    """Uses its rectifier where a plain ResNet does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(super().forward(x))


def test_a_subclass_may_use_its_rectifier_elsewhere() -> None:
    torch.manual_seed(1)
    model = Again(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7).eval()
    x = torch.randn(4, 3, 32, 32)
    wanted = model(x)
    pool_before_relu(model)
    assert torch.equal(model(x), wanted)
    assert wanted.min() == 0


def test_a_stem_without_pooling_stays_as_it_is() -> None:
    model = torchvision.models.resnet18(num_classes=7)
    model.maxpool = nn.Identity()
    pool_before_relu(model)
    assert type(model.relu) is nn.ReLU
