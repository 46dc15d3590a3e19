"""A convolutional network of your own: `model.name: ./own_model.py:SmallNet` in own_model.yaml."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Blocks of a convolution, batch norm, ReLU and pooling; then the mean over the map and a linear layer.

    Args:
        num_classes: logits for each image; rayexp gives it.
        width: channels of the first block; each further one has twice as many.
        depth: number of blocks, each of which halves the side of the map.
        dropout: before the linear layer. Masks follow from the seed: nn.Dropout is taken over by rayexp.
    """

    def __init__(self, num_classes: int, width: int = 16, depth: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 3
        for block in range(depth):
            out = width << block
            blocks += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            blocks += [nn.MaxPool2d(2)]
            channels = out
        self.features = nn.Sequential(*blocks)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, num_classes] of normalised images [n, 3, size, size]."""
        maps = self.features(images)
        return self.head(self.drop(torch.flatten(maps.mean((2, 3)), 1)))
