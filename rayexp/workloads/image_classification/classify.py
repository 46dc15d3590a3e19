"""The classes of any images, from a trained model; computed as validation computes them."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rayexp.config import ExperimentConfig
from rayexp.engine import runtime
from rayexp.workloads.image_classification.portable import ranked
from rayexp.workloads.image_classification.workload import MEAN, STD, format_of, own_model


class Classifier:
    """A context manager: PyTorch is set up as for training inside it.

    Args:
        model: a trained one, on the CPU; it is moved.
        config: that of its run.
        gpu: whether to compute on a GPU.
    """

    def __init__(self, model: nn.Module, config: ExperimentConfig, gpu: bool) -> None:
        self.model, self.config, self.format = model, config, format_of(own_model(config))
        self.device = runtime.device("cuda" if gpu else "cpu")

    def __enter__(self) -> Classifier:
        with contextlib.ExitStack() as stack:  # whatever fails, the settings are as before
            # One shard: the number of replicas changes no bit, and one batch after the other comes in.
            stack.enter_context(runtime.configure(self.config, self.device, shards=1))
            self.model = self.model.eval().to(self.device).to(memory_format=self.format)
            shift, scale = [-m / s for m, s in zip(MEAN, STD, strict=True)], [1 / s for s in STD]
            self._normal = [torch.tensor(values, device=self.device)[:, None, None] for values in (shift, scale)]
            self._settings = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._settings.close()

    def __call__(self, images: NDArray[np.uint8], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The likeliest classes int64[n, count] of images uint8[n, size, size, 3], likeliest first, and their
        probabilities float32[n, count]; classes are -1 where the model's output is not finite."""
        planes = runtime.upload(images, self.device).permute(0, 3, 1, 2).float()
        shift, scale = self._normal
        planes = torch.addcmul(shift, planes, scale).contiguous(memory_format=self.format)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with torch.inference_mode(), autocast:
            logits = self.model(planes).float()
        _, classes, probabilities = ranked(logits, count)
        return classes.cpu().numpy(), probabilities.cpu().numpy()
