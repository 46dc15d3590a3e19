"""A ResNet's stem pools before it rectifies.

max(relu(x)) = relu(max(x)), and the gradient reaches the same pixel, or none. So the stem, whose maps are the largest
of the network, need only rectify the quarter of the pixels that pooling leaves.
"""

from __future__ import annotations

import sys

import torch.nn.functional as F
from torch import Tensor, nn


class MaxPoolReLU(nn.MaxPool2d):
    """`MaxPool2d`, then `ReLU`."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool and rectify."""
        return F.relu_(super().forward(x))


def pool_before_relu(model: nn.Module) -> None:
    """Swap the order in the stem of one of torchvision's ResNets; other models, and subclasses, stay as they are."""
    resnet = sys.modules.get("torchvision.models.resnet")  # imported already, if the model is one of its own
    if resnet is None or type(model) is not resnet.ResNet or type(model.maxpool) is not nn.MaxPool2d:
        return
    pool = model.maxpool
    model.relu = nn.Identity()
    model.maxpool = MaxPoolReLU(
        pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.return_indices, pool.ceil_mode
    )
