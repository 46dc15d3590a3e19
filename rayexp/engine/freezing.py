"""Parameters that training leaves as they are (`model.freeze`).

A frozen parameter is no part of the flat buffers: it gets no gradient, no weight decay and no momentum, does not count
in clipping, and is not exchanged. A batch norm whose weight and bias are both frozen normalises by its running
statistics, as in evaluation, and leaves them as they are (`model.freeze_statistics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.config import ModelConfig
from rayexp.engine.batch_norm import BATCH_NORMS, BatchNorm
from rayexp.errors import UserError, nearest


class FixedBatchNorm(nn.Module):
    """A batch norm that normalises by running statistics which never change; its tensors have the names of the batch
    norm's.

    Args:
        norm: has running statistics; its tensors are taken over.
    """

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean) / sqrt(variance + eps) * weight + bias, of x's shape."""
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(x, mean, variance, self.weight, self.bias, training=False, eps=self.eps)


def freeze(model: nn.Module, config: ModelConfig) -> None:
    """Freeze the parameters that `model.freeze` names, in place.

    Raises:
        UserError: a pattern matches no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in config.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"model.freeze: {pattern!r} matches no parameter{_meant(pattern, names)}")
    frozen = {name for name in names if any(fnmatchcase(name, pattern) for pattern in config.freeze)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            parameter.requires_grad_(False)
    if config.freeze and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.freeze: {', '.join(config.freeze)} leaves no parameter to train")
    if config.freeze and config.freeze_statistics:
        _fix_statistics(model)


def fixed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model that training neither updates nor reduces, and that a checkpoint holds all the same:
    frozen parameters, and the statistics of `FixedBatchNorm`s, by name."""
    yield from ((name, tensor) for name, tensor in model.named_parameters() if not tensor.requires_grad)
    for name, module in model.named_modules():
        if isinstance(module, FixedBatchNorm):
            yield from ((f"{name}.{own}", buffer) for own, buffer in module.named_buffers(recurse=False))


def _fix_statistics(model: nn.Module) -> None:
    made: dict[nn.Module, FixedBatchNorm] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, BATCH_NORMS) or module.running_mean is None or not module.affine:
            continue
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, made.setdefault(module, FixedBatchNorm(module)))


def _meant(pattern: str, names: Sequence[str]) -> str:
    """What the user may have meant: all parameters of a module, or a name that is close."""
    if any(name.startswith(f"{pattern}.") for name in names):
        return f" (did you mean {pattern}.*?)"
    modules = {name.rpartition(".")[0] for name in names}
    tops = {name.partition(".")[0] for name in names}
    return nearest(pattern, [*names, *(f"{module}.*" for module in sorted(modules | tops) if module)]) or (
        f"; there are {', '.join(sorted(tops))}, each with names below it"
    )
