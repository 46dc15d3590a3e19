"""The `model` section of an experiment."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from rayexp.config.fields import listed
from rayexp.config.section import OpenSection


class ModelConfig(OpenSection):
    """The model's name and its own options, which the workload checks."""

    name: str = "resnet18"
    """The model. image_classification: an image classifier of torchvision. language_model: lstm, gru, rnn_tanh,
    rnn_relu or transformer. Or your own, by reference; the further keys are its options."""
    weights: str | None = None
    """The weights to start from: a file (.pt with a state_dict, .safetensors), a checkpoint RUN@EPOCH, or a name of
    torchvision's for weights that lie in torch's cache already (nothing is downloaded). An output layer for another
    number of classes is drawn anew. null: all weights are drawn, by `seed`."""
    freeze: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    """Patterns of parameters that stay as they are, such as `layer1.*` (`*`: any characters); `rayexp summary` shows
    what they freeze."""
    freeze_statistics: bool = True
    """true: a batch norm whose weight and bias are both frozen normalises by its running statistics and keeps them.
    false: they follow the batches, as PyTorch's do where only requires_grad is false."""
