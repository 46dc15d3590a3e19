"""Pooling before the rectifier, where a model has them the other way round.

max(relu(x)) = relu(max(x)), and the gradient reaches the same pixel, or none: so a ResNet's stem may pool first and
rectify a quarter of the pixels. The stem's maps are the largest of the network.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet


class ReLUAfterPooling(nn.Identity):
    """Stands where the rectifier was."""


class MaxPoolReLU(nn.MaxPool2d):
    """`MaxPool2d`, then `ReLU`."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool and rectify."""
        return F.relu_(super().forward(x))


def pool_first(model: nn.Module) -> None:
    """Swap rectifier and pooling of a ResNet's stem; other models stay as they are."""
    if isinstance(model, ResNet) and type(model.maxpool) is nn.MaxPool2d:
        model.relu = ReLUAfterPooling()
        model.maxpool.__class__ = MaxPoolReLU
