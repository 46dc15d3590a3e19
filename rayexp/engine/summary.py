"""The layer table of a model (output sizes, parameters, FLOPs), found on PyTorch's meta device without arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rayexp.config import ModelConfig
from rayexp.engine.freezing import freeze
from rayexp.engine.workload import Workload


@dataclass(frozen=True, slots=True)
class Layer:
    """One module that the forward pass calls.

    Attributes:
        name: dotted; empty for the whole model.
        kind: the module's class; a ResNet's stages also by their name in He et al. 2016 (conv2_x).
        output: size of its last output for one sample: HxWxC of a map, otherwise without the batch dimension.
        parameters: number of parameters, those of inner modules included.
        frozen: how many of them training leaves as they are.
        flops: floating-point operations of the forward pass for one sample, inner modules included; a multiply-add
            counts as two.
        depth: number of listed modules that contain this one; 0 for the whole model.
    """

    name: str
    kind: str
    output: str
    parameters: int
    frozen: int
    flops: int
    depth: int


def layers(workload: Workload, config: ModelConfig | None = None) -> list[Layer]:
    """The layers in the order of the model's definition, the whole model last; frozen is what `config` says.

    Makes one pass over `workload.example()` (one image, or one column of one window) and leaves out modules that it
    does not call.
    """
    model = workload.model()
    freeze(model, config or ModelConfig())
    model = model.eval().to("meta")
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: _keep(outputs, name, out))
        for name, module in model.named_modules()
    ]
    example = [part.to("meta") if isinstance(part, Tensor) else part for part in workload.example()]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*example)
    for hook in hooks:
        hook.remove()
    counts = counter.get_flop_counts()
    root = type(model).__name__
    stages = _stages(model)
    found = [
        Layer(
            name,
            stages.get(name, type(module).__name__),
            _size(outputs[name], workload.batch_dim),
            sum(p.numel() for p in module.parameters()),
            sum(p.numel() for p in module.parameters() if not p.requires_grad),
            int(sum(counts.get(f"{root}.{name}" if name else root, {}).values())),
            sum(name.startswith(f"{outer}.") or not outer for outer in outputs if outer != name),
        )
        for name, module in model.named_modules()
        if name in outputs
    ]
    return [*(layer for layer in found if layer.name), *(layer for layer in found if not layer.name)]


def _keep(outputs: dict[str, Tensor], name: str, out: Any) -> None:
    while isinstance(out, tuple | list) and out:
        out = out[0]
    if isinstance(out, Tensor):
        outputs[name] = out


def _stages(model: nn.Module) -> dict[str, str]:
    """`layer1` of a torchvision ResNet is conv2_x in the paper, and so on."""
    if not type(model).__module__.endswith("models.resnet"):
        return {}
    return {f"layer{i}": f"Sequential (conv{i + 1}_x)" for i in range(1, 5)}


def _size(out: Tensor, batch_dim: int) -> str:
    sizes = list(out.shape)
    if batch_dim < len(sizes):
        del sizes[batch_dim]
    # Maps come as channels, height, width; a Swin transformer's as height, width, channels.
    if out.ndim == 4 and not (sizes[0] == sizes[1] != sizes[2]):
        sizes = [*sizes[1:], sizes[0]]
    return "x".join(map(str, sizes))
