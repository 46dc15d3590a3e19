"""A decoder-only transformer: RMSNorm before each part (Zhang and Sennrich 2019), rotary positions (Su et al. 2021),
gated feed-forward (SwiGLU, Shazeer 2020), no biases."""

from __future__ import annotations

from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from rayexp.engine.rng import Dropout

KeyValueCache = tuple[Tensor, ...]
"""Keys and values of every block, each [columns, heads, words read, size of a head]; () where nothing is cached."""


class TransformerOptions(BaseModel):
    """`model.*` of a transformer."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    emsize: PositiveInt = 256
    """Width of the model."""
    nhid: PositiveInt = 704
    """Units of a feed-forward part."""
    nlayers: PositiveInt = 4
    """Decoder layers."""
    nhead: PositiveInt = 4
    """Attention heads of a layer; emsize is an even multiple of it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """On the word vectors, on every part's output, and on the model's output."""
    tied: bool = True
    """The word vectors are the output layer's weights too."""
    context: Annotated[int, Field(ge=0)] = 0
    """Words before a window that its words attend to as well; the loss is that of the window alone."""

    @model_validator(mode="after")
    def _even_heads(self) -> Self:
        if self.emsize % (2 * self.nhead):
            raise ValueError(f"nhead: emsize {self.emsize} is not an even multiple of {self.nhead} heads")
        return self


class Transformer(nn.Module):
    """Blocks and a last norm. A position attends to itself and to the positions before it in the same call; with a
    cache (see `begin`) also to the last `span` words of earlier calls.

    Attributes:
        size: width of the model.
        span: words that the cache holds at most.
        heads: number of heads, and their size.
    """

    def __init__(self, options: TransformerOptions, span: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.nlayers))
        self.norm = nn.RMSNorm(options.emsize)
        self.size, self.span = options.emsize, span
        self.heads = (options.nhead, options.emsize // options.nhead)

    def begin(self, columns: int, device: torch.device) -> KeyValueCache:
        """An empty key-value cache."""
        heads, size = self.heads
        return tuple(torch.empty(columns, heads, 0, size, device=device) for _ in range(2 * len(self.blocks)))

    def forward(self, x: Tensor, state: KeyValueCache = ()) -> tuple[Tensor, KeyValueCache]:
        """[time, columns, features] -> the same shape, and the cache, if one was given."""
        after: list[Tensor] = []
        turn = rotation((state[0].shape[2] if state else 0) + len(x), self.heads[1], x.device)
        for i, block in enumerate(self.blocks):
            x, cache = block(x, state[2 * i : 2 * i + 2], turn)
            after += [part[:, :, -self.span :] for part in cache]
        return self.norm(x), tuple(after)

    def ranges(self) -> dict[str, float]:
        """The range r of each matrix, which is drawn uniformly from [-r, r]: a standard deviation of 0.02, smaller by
        sqrt(2 blocks) at the end of a residual branch (Radford et al. 2019). Norms start at 1."""
        wide = 0.02 * 3**0.5
        narrow = wide / (2 * len(self.blocks)) ** 0.5
        ends = ("attention_out.weight", "down.weight")
        return {n: narrow if n.endswith(ends) else wide for n, p in self.named_parameters() if p.ndim > 1}


class Block(nn.Module):
    """Attention and feed-forward, each computed on the normalised input and added to it."""

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__()
        size = options.emsize
        self.heads = options.nhead
        self.attention_norm = nn.RMSNorm(size)
        self.attention_in = nn.Linear(size, 3 * size, bias=False)
        self.attention_out = nn.Linear(size, size, bias=False)
        self.forward_norm = nn.RMSNorm(size)
        self.up = nn.Linear(size, 2 * options.nhid, bias=False)
        self.down = nn.Linear(options.nhid, size, bias=False)
        self.drop = Dropout(options.dropout, dim=1)

    def forward(self, x: Tensor, cache: KeyValueCache, turn: Tensor) -> tuple[Tensor, KeyValueCache]:
        """[time, columns, features] -> the same shape, and the cache with these positions appended; `turn` is the
        `rotation` of all positions."""
        attended, cache = self.attend(self.attention_norm(x), cache, turn)
        x = x + self.drop(attended)
        gate, up = self.up(self.forward_norm(x)).chunk(2, -1)
        return x + self.drop(self.down(F.silu(gate) * up)), cache

    def attend(self, x: Tensor, cache: KeyValueCache, turn: Tensor) -> tuple[Tensor, KeyValueCache]:
        """Causal attention over the cache and x: [time, columns, features], and the cache."""
        time, columns, size = x.shape
        parts = self.attention_in(x).view(time, columns, 3, self.heads, size // self.heads)
        query, key, value = parts.permute(2, 1, 3, 0, 4)  # each [columns, heads, time, size of a head]
        past = cache[0].shape[2] if cache else 0
        if cache:
            key, value = torch.cat([cache[0].to(key.dtype), key], 2), torch.cat([cache[1].to(value.dtype), value], 2)
            cache = (key, value)
        # Keys are cached before they are rotated, since positions count from the cache's first word, whichever it is.
        query, turned = rotate(query, turn[:, -time:]), rotate(key, turn)
        mask = None
        if past and time > 1:
            mask = torch.ones(time, past + time, dtype=torch.bool, device=x.device).tril(past)
        out = F.scaled_dot_product_attention(query, turned, value, mask, is_causal=not past)
        return self.attention_out(out.permute(2, 0, 1, 3).reshape(time, columns, size)), cache


def rotation(positions: int, size: int, device: torch.device) -> Tensor:
    """Cosines and sines of the angles of all positions: [2, positions, size / 2]."""
    rates = 10_000.0 ** -(torch.arange(0, size, 2, device=device) / size)
    angles = torch.arange(positions, device=device)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_i+size/2) of x [..., positions, size] by the angles of their positions."""
    a, b = x.chunk(2, -1)
    cos, sin = turn.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
