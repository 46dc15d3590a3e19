"""A trained classifier outside of rayexp: how torchvision builds it, and what its numbers mean."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.engine.portable import Portable

STRIDES = {"stride2": 2, "small": 1}  # of a stem's 3x3 convolution


def portable_classifier(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    build: Sequence[str],
    architecture: str,
    classes: Sequence[Sequence[str]],
    pixels: tuple[int, Sequence[float], Sequence[float]],
) -> Portable:
    """See Portable.

    Args:
        model: fresh; it gets the weights.
        architecture: its name.
        classes: (id, readable name) of each class.
        pixels: the size of images, and the mean and the standard deviation of their channels, for 0 to 255.

    Raises:
        RuntimeError: the weights are of another model.
    """
    size, mean, std = pixels
    model.load_state_dict(weights)
    return Portable(
        model=model.eval(),
        weights=weights,
        inputs=(torch.zeros(2, 3, size, size),),
        axes=({0: "batch"},),
        build=tuple(build),
        about={
            "task": "image classification",
            "architecture": architecture,
            "categories": [list(one) for one in classes],
            "image_size": size,
            "mean": [value / 255 for value in mean],
            "std": [value / 255 for value in std],
            "input": f"float32[batch, 3, {size}, {size}]: RGB from 0 to 1, less mean, over std; the shorter side "
            f"resized to {size} (bilinear, antialiased), the centre cropped",
            "output": f"float32[batch, {len(classes)}]: logits",
        },
    )


def ranked(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probabilities fp32[n, classes], the `count` likeliest classes int64[n, count], likeliest first, and their
    probabilities fp32[n, count]. Where logits give no probabilities (one is NaN or infinite), the classes are -1 and
    their probabilities NaN."""
    logs = F.log_softmax(logits, 1)
    # A stable sort, so that of equal logits the lower class comes first on every device; it puts NaN first.
    top = logs.sort(stable=True, dim=1, descending=True).indices[:, :count]
    broken = logs.isnan().any(1)[:, None]
    return logs, top.masked_fill(broken, -1), logs.gather(1, top).exp().masked_fill(broken, torch.nan)


def arguments(name: str, classes: int, image_size: int) -> dict[str, Any]:
    """What a builder of torchvision's takes for so many classes and images of this size."""
    from torchvision import models

    known = inspect.signature(models.get_model_builder(name)).parameters
    kwargs: dict[str, Any] = {"num_classes": classes}
    if name.startswith("vit_"):
        kwargs["image_size"] = image_size
    if name.startswith("maxvit"):
        kwargs["input_size"] = (image_size, image_size)
    if "aux_logits" in known or name in ("googlenet", "inception_v3"):
        kwargs["aux_logits"] = False
    return kwargs


def recipe(name: str, stem: str, classes: int, image_size: int) -> list[str]:
    """Lines of Python that build the same model with torchvision alone."""
    kwargs = arguments(name, classes, image_size)
    if "aux_logits" in kwargs:
        kwargs["init_weights"] = False  # the weights are loaded; without a word torchvision warns
    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    lines = [f"from torchvision.models import {name}", f"model = {name}({given})"]
    if stem in STRIDES:
        convolution = f"nn.Conv2d(3, 64, 3, stride={STRIDES[stem]}, padding=1, bias=False)"
        lines = ["from torch import nn", *lines, f"model.conv1 = {convolution}", "model.maxpool = nn.Identity()"]
    return lines
