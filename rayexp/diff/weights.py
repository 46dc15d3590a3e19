"""Which layers moved from one checkpoint to the other? Read tensor by tensor, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayexp.display import plain
from rayexp.errors import UserError
from rayexp.runs.retention import checkpoint_of
from rayexp.runs.run import Run

PREFIX = "model."  # of the model's tensors in state.safetensors; the optimizer's and the carried state have others
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # what normalisation layers count, not weights


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor: `norm` = |A|, `moved` = |B - A|, `relative` = |B - A| / |A| (L2; inf where A is all zero and B is
    not), `largest` = max |B - A|."""

    name: str
    shape: tuple[int, ...]
    norm: float
    moved: float
    relative: float
    largest: float


@dataclass(frozen=True, slots=True)
class LayerChange:
    """The weights of one module together (`layer1.0.conv1`): their number, |A|, |B - A| and |B - A| / |A|."""

    name: str
    weights: int
    norm: float
    moved: float
    relative: float


@dataclass(frozen=True, slots=True)
class WeightsReport:
    """The common tensors by name, the layers that moved most first, and the tensors that only one side has (or has in
    another shape)."""

    layers: tuple[LayerChange, ...]
    tensors: tuple[TensorChange, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    relative: float
    """|B - A| / |A| over all common weights together."""

    @property
    def equal(self) -> bool:
        """Whether nothing moved."""
        return not self.only_a and not self.only_b and all(t.largest == 0 for t in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """`relative` over all, the layers, and the tensors."""
        layers, tensors = (
            [{name: getattr(row, name) for name in row.__slots__} for row in rows]
            for rows in (self.layers, self.tensors)
        )
        head = {"equal": self.equal, "relative": self.relative, "only_a": self.only_a, "only_b": self.only_b}
        return dict(plain({**head, "layers": layers, "tensors": tensors}))


def diff_weights(a: tuple[Run, int], b: tuple[Run, int]) -> WeightsReport:
    """Compare the model tensors of two checkpoints.

    Raises:
        UserError: a checkpoint is missing or damaged, or the models have no tensor in common.
    """
    paths = [checkpoint_of(run, epoch) / "state.safetensors" for run, epoch in (a, b)]
    with _open(paths[0]) as first, _open(paths[1]) as second:
        names = [sorted((n for n in f.keys() if n.startswith(PREFIX)), key=_natural) for f in (first, second)]  # noqa: SIM118
        for path, found in zip(paths, names, strict=True):
            if not found:
                raise UserError(f"{path}: holds no tensor named {PREFIX}*")
        shapes = [{n: _shape(f, n) for n in found} for f, found in zip((first, second), names, strict=True)]
        common = [n for n in names[0] if shapes[1].get(n) == shapes[0][n]]
        if not common:
            raise UserError(f"{paths[0]} and {paths[1]}: the models have no tensor of one name and shape in common")
        changes = [_change(n.removeprefix(PREFIX), first.get_tensor(n), second.get_tensor(n)) for n in common]
    layers = _layers(changes)
    norm, moved = (math.hypot(*(getattr(layer, part) for layer in layers)) for part in ("norm", "moved"))
    rest = [tuple(n.removeprefix(PREFIX) for n in found if n not in common) for found in names]
    return WeightsReport(layers, tuple(changes), rest[0], rest[1], _ratio(moved, norm))


def _layers(changes: list[TensorChange]) -> tuple[LayerChange, ...]:
    modules: dict[str, list[TensorChange]] = {}
    for t in changes:
        module, _, name = t.name.rpartition(".")
        if name not in STATISTICS:
            modules.setdefault(module or name, []).append(t)
    layers = []
    for module, tensors in modules.items():
        norm, moved = math.hypot(*(t.norm for t in tensors)), math.hypot(*(t.moved for t in tensors))
        layers.append(LayerChange(module, sum(math.prod(t.shape) for t in tensors), norm, moved, _ratio(moved, norm)))
    return tuple(sorted(layers, key=lambda x: -x.relative if x.relative == x.relative else -math.inf))


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _natural(name: str) -> list[tuple[int, str]]:
    """`layer.2` before `layer.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _shape(file: Any, name: str) -> tuple[int, ...]:
    return tuple(file.get_slice(name).get_shape())


def _change(name: str, a: Any, b: Any) -> TensorChange:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    with np.errstate(invalid="ignore"):  # inf - inf
        delta = y - x
    norm, moved = float(np.linalg.norm(x)), float(np.linalg.norm(delta))
    return TensorChange(name, tuple(a.shape), norm, moved, _ratio(moved, norm), float(np.abs(delta).max(initial=0)))


def _ratio(moved: float, norm: float) -> float:
    if norm > 0:
        return moved / norm
    return 0.0 if moved == 0 else float("inf")
