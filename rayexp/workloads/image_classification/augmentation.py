"""Random resized crop and flip as batched tensor operations, on any device.

Cropping and resizing is a linear map of rows and of columns: an image is multiplied by two small matrices, and a batch
takes two batched products, out = Rh @ image @ Rw^T. The matrices hold Pillow's antialiased bilinear filter (a triangle
as wide as the scale), which torchvision's RandomResizedCrop uses on images.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayexp.config import AugmentConfig
from rayexp.engine.runtime import upload

TRIES = 10
DRAWS = 2 * TRIES + 3


def boxes(config: AugmentConfig, draws: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Crop boxes as torchvision's RandomResizedCrop.get_params draws them: up to ten tries of area and aspect ratio
    (log-uniform), otherwise the largest centred box with an allowed ratio. With `pad`, a window of the image's own
    size, shifted by up to `pad` pixels.

    Args:
        draws: float64[n, DRAWS] in [0, 1).
        height, width: of the images, in pixels.

    Returns:
        float64[n, 4]: top, left, height and width in whole pixels.
    """
    n = len(draws)
    u, v = draws[:, 2 * TRIES], draws[:, 2 * TRIES + 1]
    if config.pad:
        top, left = np.floor(u * (2 * config.pad + 1)) - config.pad, np.floor(v * (2 * config.pad + 1)) - config.pad
        return np.stack([top, left, np.full(n, height), np.full(n, width)], 1).astype(np.float64)
    area = height * width * (config.scale[0] + (config.scale[1] - config.scale[0]) * draws[:, :TRIES])
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = np.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(1)
    rows = np.arange(n)
    h, w = h[rows, first], w[rows, first]
    whole = width / height
    best = min(max(whole, config.ratio[0]), config.ratio[1])
    fall_h, fall_w = (np.rint(width / best), width) if whole < best else (height, np.rint(height * best))
    found = fits.any(1)
    h, w = np.where(found, h, min(fall_h, height)), np.where(found, w, min(fall_w, width))
    top = np.where(found, np.floor(u * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(v * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], 1)


def resampling(start: Tensor, length: Tensor, size: int, out: int, clip: bool = True) -> Tensor:
    """Matrices that cut [start, start + length) out of `size` pixels and resize it to `out` pixels.

    Args:
        start, length: fp32[n], in pixels.
        clip: whether weights end at the edge of the cut, as if it had been cut out first; otherwise pixels outside the
            image count as zero.

    Returns:
        fp32[n, out, size].
    """
    scale = (length / out)[:, None, None]
    support = scale.clamp(min=1.0)
    centre = start[:, None, None] + (torch.arange(out, device=start.device)[None, :, None] + 0.5) * scale
    x = torch.arange(size, device=start.device)[None, None, :] + 0.5
    weights = (1 - ((x - centre) / support).abs()).clamp_(min=0)
    if not clip:
        return weights
    inside = (x > start[:, None, None]) & (x < (start + length)[:, None, None])
    weights = weights * inside
    return weights / weights.sum(-1, keepdim=True)


def augment(images: Tensor, config: AugmentConfig, draws: NDArray[np.float64]) -> Tensor:
    """Augmented images fp32[n, 3, h, w] (0..255) from `images` uint8[n, h, w, 3] and `draws` float64[n, DRAWS]."""
    n, height, width, _ = images.shape
    box = upload(boxes(config, draws, height, width).astype(np.float32), images.device)
    rows = resampling(box[:, 0], box[:, 2], height, height, clip=not config.pad)
    columns = resampling(box[:, 1], box[:, 3], width, width, clip=not config.pad)
    if config.flip:
        mirrored = upload(draws[:, 2 * TRIES + 2] < 0.5, images.device)
        columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    # [n, row, channel, column]: one product for all channels of an image, first over rows, then over columns.
    pixels = images.permute(0, 1, 3, 2).to(torch.float32, memory_format=torch.contiguous_format)
    cut = torch.bmm(rows, pixels.flatten(2)).view(n, height * 3, width)
    return torch.bmm(cut, columns.transpose(1, 2)).view(n, height, 3, width).permute(0, 2, 1, 3)
