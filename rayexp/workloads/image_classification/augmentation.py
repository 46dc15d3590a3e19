"""Random resized crop and flip as batched tensor operations, on any device.

Cropping and resizing is a linear map of rows and of columns: an image is multiplied by two small matrices, and a batch
takes two batched products, out = Rh @ image @ Rw^T. The matrices hold Pillow's antialiased bilinear filter (a triangle
as wide as the scale), which torchvision's RandomResizedCrop uses on images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rayexp.config import AugmentConfig

TRIES = 10
DRAWS = 2 * TRIES + 3


def boxes(config: AugmentConfig, draws: Tensor, height: int, width: int) -> Tensor:
    """Crop boxes as torchvision's RandomResizedCrop.get_params draws them: up to ten tries of area and aspect ratio
    (log-uniform), otherwise the largest centred box with an allowed ratio. With `pad`, a window of the image's own
    size, shifted by up to `pad` pixels.

    Computed in float64, where devices and libraries differ at most in the last bit of the exponential. That bit moves a
    box only if a side lies within some 1e-13 pixels of a half.

    Args:
        draws: float64[n, DRAWS] in [0, 1).
        height, width: of the images, in pixels.

    Returns:
        float64[n, 4], on the draws' device: top, left, height and width in whole pixels.
    """
    u, v = draws[:, 2 * TRIES], draws[:, 2 * TRIES + 1]
    if config.pad:
        top, left = ((one * (2 * config.pad + 1)).floor_() - config.pad for one in (u, v))
        return torch.stack([top, left, torch.full_like(u, height), torch.full_like(u, width)], 1)
    area = height * width * (config.scale[0] + (config.scale[1] - config.scale[0]) * draws[:, :TRIES])
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = torch.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES])
    w, h = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    one_fits, first = fits.to(torch.uint8).max(1, keepdim=True)  # of several that fit, the first
    none = one_fits[:, 0] == 0
    whole = width / height
    best = min(max(whole, config.ratio[0]), config.ratio[1])
    fall_h, fall_w = (round(width / best), width) if whole < best else (height, round(height * best))
    h = h.gather(1, first)[:, 0].masked_fill_(none, min(fall_h, height))
    w = w.gather(1, first)[:, 0].masked_fill_(none, min(fall_w, width))
    top = torch.where(none, (height - h) / 2, u * (height - h + 1)).floor_()
    left = torch.where(none, (width - w) / 2, v * (width - w + 1)).floor_()
    return torch.stack([top, left, h, w], 1)


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
    x = torch.arange(size, device=start.device) + 0.5
    wanted = x if out == size else torch.arange(out, device=start.device) + 0.5
    centre = start[:, None, None] + wanted[None, :, None] * scale
    weights = (1 - ((x - centre) / support).abs()).clamp_(min=0)
    if not clip:
        return weights
    inside = (x > start[:, None, None]) & (x < (start + length)[:, None, None])
    weights = weights * inside
    return weights / weights.sum(-1, keepdim=True)


def augment(images: Tensor, config: AugmentConfig, draws: Tensor, sizes: Sequence[int] = ()) -> Tensor:
    """Augmented images fp32[n, 3, h, w] (0..255) from `images` uint8[n, h, w, 3] and `draws` float64[n, DRAWS], all on
    one device and without waiting for it.

    Args:
        sizes: images of each shard; none: all are one. Each has matrix products of its own, since libraries choose how
            they add up by the number of matrices. All else is computed for all shards at once, with the same bits.
    """
    n, height, width, _ = images.shape
    box = boxes(config, draws, height, width).float()
    rows, columns = _matrices(box, height, width, clip=not config.pad)
    if config.flip:
        mirrored = draws[:, 2 * TRIES + 2] < 0.5
        columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    # [n, row, channel, column]: one product for all channels of an image, first over rows, then over columns.
    pixels = images.permute(0, 1, 3, 2).to(torch.float32, memory_format=torch.contiguous_format)
    shards = [torch.split(each, list(sizes) or [n]) for each in (rows, pixels.flatten(2), columns.transpose(1, 2))]
    made = torch.empty_like(pixels)
    for out, r, p, c in zip(torch.split(made, list(sizes) or [n]), *shards, strict=True):
        cut = torch.bmm(r, p).view(len(p), height * 3, width)
        torch.bmm(cut, c, out=out.view(len(p), height * 3, width))
    return made.permute(0, 2, 1, 3)


def _matrices(box: Tensor, height: int, width: int, clip: bool) -> tuple[Tensor, Tensor]:
    """The matrices (see `resampling`) of the rows and of the columns of boxes fp32[n, 4]."""
    if height == width:  # both in one go: a GPU waits for each kernel, however small
        both = resampling(box[:, :2].t().reshape(-1), box[:, 2:].t().reshape(-1), height, height, clip)
        rows, columns = both.chunk(2)
        return rows, columns
    rows = resampling(box[:, 0], box[:, 2], height, height, clip)
    return rows, resampling(box[:, 1], box[:, 3], width, width, clip)
