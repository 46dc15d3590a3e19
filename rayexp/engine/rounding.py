"""Which weights autocast would round to bfloat16 in every pass: those of matrix products and convolutions."""

from __future__ import annotations

from torch import nn

_PRODUCTS = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def of_products(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of convolutions and linear layers that have one name only."""
    held: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), []).append(name)
    layers = [name for name, module in model.named_modules() if type(module) in _PRODUCTS]
    named = {f"{layer}.{name}".lstrip(".") for layer in layers for name in ("weight", "bias")}
    return frozenset(names[0] for names in held.values() if len(names) == 1 and names[0] in named)
