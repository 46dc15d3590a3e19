"""Which weights autocast would round to bfloat16 in every pass: those of matrix products and convolutions."""

from __future__ import annotations

from torch import nn

_PRODUCTS = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def of_products(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that have one name only and belong to convolutions, linear layers, or a module that says
    of itself that its weight and bias are used in products alone (`only_products = True`)."""
    held: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), []).append(name)
    layers = [
        name
        for name, module in model.named_modules()
        if type(module) in _PRODUCTS or getattr(module, "only_products", False)
    ]
    named = {f"{layer}.{name}".lstrip(".") for layer in layers for name in ("weight", "bias")}
    return frozenset(names[0] for names in held.values() if len(names) == 1 and names[0] in named)
