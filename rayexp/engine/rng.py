"""Dropout whose masks are drawn per shard from (seed, epoch, step, shard), never from a global generator.

Threads share torch's global CPU generator, and a worker's position in it depends on the number of workers. So every
module that draws is replaced by one that uses the generators in a `Draws`, which the engine sets before each pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rayexp.errors import UserError


class Draws:
    """The random generators of the shards in the present pass; each replica has one `Draws`.

    Attributes:
        generators: one for each shard of the pass.
        sizes: samples of each shard of the pass.
    """

    def __init__(self) -> None:
        self.generators: tuple[torch.Generator, ...] = ()
        self.sizes: tuple[int, ...] = ()

    def begin(self, generators: Sequence[torch.Generator], sizes: Sequence[int]) -> None:
        """Begin a pass over shards of these sizes (samples), which draw from these generators."""
        self.generators, self.sizes = tuple(generators), tuple(sizes)

    def rows(self, count: int) -> list[int]:
        """How many of `count` rows of an activation belong to each shard: samples may be folded with time, patches or
        heads, the samples outermost.

        Raises:
            RuntimeError: they are no multiple of the samples.
        """
        samples = sum(self.sizes)
        if samples == 0 or count % samples:
            raise RuntimeError("a layer ran outside a training pass, or on another batch than announced")
        return [size * (count // samples) for size in self.sizes]

    def bernoulli(self, like: Tensor, keep: float, dim: int, shape: Sequence[int] | None = None) -> Tensor:
        """Draw a mask of zeros and ones in `like`'s dtype; each shard's slice along `dim` comes from its generator.

        Args:
            like: the activation; its size along `dim` is the samples of all shards.
            keep: probability of a 1.
            dim: the dimension along which samples lie.
            shape: the mask's shape where it is smaller than `like` (broadcast), with the same size along `dim`.
        """
        shape, parts = list(like.shape if shape is None else shape), []
        for generator, rows in zip(self.generators, self.rows(shape[dim]), strict=True):
            shape[dim] = rows
            parts.append(torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(keep, generator=generator))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def seeded(keys: Iterable[int], device: torch.device) -> tuple[torch.Generator, ...]:
    """A generator for each key, with it as seed."""
    return tuple(torch.Generator(device).manual_seed(key) for key in keys)


class Dropout(nn.Module):
    """`nn.Dropout` with masks from a `Draws`.

    Attributes:
        p: probability of zeroing an element.
        dim: the dimension along which samples lie.
        draws: where the masks come from.
    """

    def __init__(self, p: float, dim: int = 0, draws: Draws | None = None) -> None:
        super().__init__()
        self.p, self.dim, self.draws = p, dim, draws or Draws()

    def forward(self, x: Tensor) -> Tensor:
        """Zero elements with probability p and scale the rest by 1 / (1 - p); the identity in eval mode."""
        if not self.training or self.p == 0:
            return x
        return x * self.draws.bernoulli(x, 1 - self.p, self.dim).div_(max(1 - self.p, 1e-12))

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"p={self.p}"


class StochasticDepth(nn.Module):
    """torchvision's `StochasticDepth` (Huang et al. 2016) with masks from a `Draws`.

    Attributes:
        p: probability of dropping the branch.
        mode: `row` drops it for each sample, `batch` for each shard.
        draws: where the masks come from.
    """

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode, self.draws = p, mode, Draws()

    def forward(self, x: Tensor) -> Tensor:
        """Drop a residual branch, per sample (`row`) or per shard (`batch`)."""
        if not self.training or self.p == 0:
            return x
        shape = [x.shape[0]] + [1] * (x.ndim - 1)
        mask = self.draws.bernoulli(x, 1 - self.p, 0, shape)
        if self.mode == "batch":
            firsts = [part[:1].expand_as(part) for part in torch.split(mask, self.draws.rows(len(mask)))]
            mask = torch.cat(firsts)
        return x * mask / max(1 - self.p, 1e-12)


def adopt(model: nn.Module, draws: Draws, dim: int) -> bool:
    """Replace every random layer of `model` by a keyed form that draws from `draws`; whether there was one.

    A layer with several names is replaced under each of them.

    Args:
        dim: the dimension of activations along which samples lie.

    Raises:
        UserError: a layer draws by itself, and there is no keyed form of it.
    """
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if (keyed := _keyed(name, layer, draws, dim)) is not None:
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, keyed)
    return any(isinstance(layer, Dropout | StochasticDepth) for layer in model.modules())


def _keyed(name: str, layer: Any, draws: Draws, dim: int) -> nn.Module | None:
    """The keyed form of a random layer; None where nothing needs to be replaced."""
    kind = type(layer).__name__
    if isinstance(layer, Dropout | StochasticDepth):
        layer.draws = draws
    elif type(layer) is nn.Dropout:
        return Dropout(layer.p, dim, draws)
    elif kind == "StochasticDepth":
        keyed = StochasticDepth(layer.p, layer.mode)
        keyed.draws = draws
        return keyed
    elif (refused := unkeyed(layer)) is not None:
        raise UserError(f"model: {name} ({kind}) {refused[0]}; allowed: {refused[1]}")
    return None


def unkeyed(layer: Any) -> tuple[str, str] | None:
    """Why a random layer has no keyed form, and what is allowed instead; None where it has one, or needs none."""
    if isinstance(layer, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout | nn.FeatureAlphaDropout):
        return "has no form with draws per shard", "nn.Dropout"
    # Others may have an attribute of that name; if they draw, they are caught drawing (see engine/contract).
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention) and layer.dropout:
        return "draws dropout by itself", "a dropout of 0 there"
    return None
