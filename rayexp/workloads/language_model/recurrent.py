"""Stacks of recurrent layers with dropout between them; the hidden state is an argument and a result."""

from __future__ import annotations

import warnings
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from rayexp.engine.rng import Dropout

# The weights lie in the engine's flat buffer, so cuDNN has to gather them; they are small.
warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")

HiddenState = tuple[Tensor, ...]
"""(h,) or of an LSTM (h, c), each [layers, columns, hidden]; () before the first word."""
LAYERS = {"rnn_tanh": nn.RNN, "rnn_relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentOptions(BaseModel):
    """`model.*` of a recurrent model; names and defaults are those of pytorch/examples word_language_model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    emsize: PositiveInt = 200
    """Size of the word vectors."""
    nhid: PositiveInt = 200
    """Hidden units of a layer."""
    nlayers: PositiveInt = 2
    """Recurrent layers, one upon the other."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """On the word vectors, between layers, and on the output."""
    tied: bool = False
    """The word vectors are the output layer's weights too (Press and Wolf 2016); needs nhid = emsize."""


class Recurrent(nn.Module):
    """Layers of one kind. Each is a PyTorch stack of one layer, since the dropout inside a stack draws from the global
    generator.

    Attributes:
        size: hidden units of a layer.
        parts: tensors of the hidden state.
    """

    def __init__(self, name: str, options: RecurrentOptions) -> None:
        super().__init__()
        extra = {"nonlinearity": name.removeprefix("rnn_")} if name.startswith("rnn_") else {}
        sizes = [options.emsize] + [options.nhid] * (options.nlayers - 1)
        self.layers = nn.ModuleList(LAYERS[name](size, options.nhid, **extra) for size in sizes)
        self.drop = Dropout(options.dropout, dim=1)
        self.size = options.nhid
        self.parts = 2 if name == "lstm" else 1

    def begin(self, columns: int, device: torch.device) -> HiddenState:
        """The state before the first word: zeros."""
        return tuple(torch.zeros(len(self.layers), columns, self.size, device=device) for _ in range(self.parts))

    def forward(self, x: Tensor, state: HiddenState = ()) -> tuple[Tensor, HiddenState]:
        """[time, columns, features] and the state before it (or ()) -> [time, columns, hidden] and the state after."""
        state = state or self.begin(x.shape[1], x.device)
        after = []
        # Autocast is for the large products of the output layer; here it would round the state at every word.
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            for i, layer in enumerate(self.layers):
                if i:
                    x = self.drop(x)
                here = [part[i : i + 1].to(x.dtype) for part in state]
                x, left = layer(x, tuple(here) if self.parts == 2 else here[0])
                after.append(left if self.parts == 2 else (left,))
        return x, tuple(torch.cat(parts) for parts in zip(*after, strict=True))

    def ranges(self) -> dict[str, float]:
        """The range r of each parameter, which is drawn uniformly from [-r, r]: 1 / sqrt(hidden), as PyTorch does."""
        return {name: self.size**-0.5 for name, _ in self.named_parameters()}
