"""Which part of a model has no deterministic kernel: PyTorch names the kernel, and here the module is found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rayexp.engine.contract.breach import named
from rayexp.engine.contract.calls import tensors
from rayexp.errors import UserError

_TOLD = " does not have a deterministic implementation"


def operation_of(error: Exception) -> str | None:
    """The kernel that PyTorch has refused for being not deterministic; None: the error is another one."""
    operation, found, _ = str(error).partition(_TOLD)
    return operation if found else None


def refusal(operation: str, device: torch.device, module: str = "") -> UserError:
    """What is said of a kernel that `operation_of` has found; `module`: in which it is, where that is known."""
    where = f"{operation} in {module}" if module else operation
    return UserError(
        f"reduction: exact takes deterministic operations only, and {where} has no such kernel for {device.type}; "
        "allowed with this model: ddp"
    )


def module_of(model: nn.Module, run: Callable[[], object]) -> str:
    """The innermost module of which the forward or backward pass is refused while `run` makes a pass through the model:
    `middle.1 (AdaptiveMaxPool2d)`; `the loss` where none is."""
    begun: list[str] = []
    found: list[str] = []

    def begin(name: str) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            begun.append(named(name, module))

        return enter

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = begun.pop()
        made = [tensor for tensor in tensors(output) if tensor.requires_grad]
        given = [tensor for tensor in tensors((args, kwargs)) if tensor.requires_grad]
        into = [*given, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
        if found or not made or not into:
            return
        try:
            with warnings.catch_warnings(action="ignore"):  # of streams; nothing comes of these gradients
                # No further back than to what the module was given; those within it have come before.
                torch.autograd.grad(made, into, list(map(torch.ones_like, made)), retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if operation_of(error) is not None:
                found.append(name)

    hooks: list[Any] = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(begin(name)))
        hooks.append(module.register_forward_hook(end, with_kwargs=True))
    try:
        run()
    except RuntimeError as error:
        if operation_of(error) is None:
            raise
    finally:
        for hook in hooks:
            hook.remove()
    return (found or begun[-1:] or ["the loss"])[0]
