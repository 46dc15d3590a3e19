"""A trained language model as a plain PyTorch module: a graph of PyTorch's layers and functions, which can be saved,
loaded and exported without rayexp."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.workloads.language_model.model import LanguageNet
from rayexp.workloads.language_model.recurrent import Recurrent
from rayexp.workloads.language_model.transformer import Transformer, rotate


def plain(net: LanguageNet) -> torch.fx.GraphModule:
    """The same function without a state: int64[time, columns], the numbers of words, to the logits [time, columns,
    words] of the word after each of them. Its weights are those of `net`, under the same names; dropout is left out, so
    it is for use and not for further training."""
    reader = _RecurrentReader(net, net.body) if isinstance(net.body, Recurrent) else _AttentiveReader(net, net.body)
    graph = torch.fx.symbolic_trace(reader.eval())
    return graph.eval()


class _Reader(nn.Module):
    """Word vectors and the output layer. A tied output layer has no weight of its own."""

    def __init__(self, net: LanguageNet) -> None:
        super().__init__()
        words, size = net.encoder.weight.shape
        self.encoder = nn.Embedding(words, size, _weight=net.encoder.weight)
        self.decoder: Any = nn.Module()
        self.decoder.register_parameter("weight", net.decoder.weight)
        self.decoder.register_parameter("bias", net.decoder.bias)

    def logits(self, x: Tensor) -> Tensor:
        weight = self.encoder.weight if self.decoder.weight is None else self.decoder.weight
        return F.linear(x, weight, self.decoder.bias)


class _RecurrentReader(_Reader):
    def __init__(self, net: LanguageNet, body: Recurrent) -> None:
        super().__init__(net)
        self.body: Any = nn.Module()
        self.body.layers = body.layers

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(tokens)
        for layer in self.body.layers:
            x = layer(x)[0]
        return self.logits(x)


class _AttentiveReader(_Reader):
    def __init__(self, net: LanguageNet, body: Transformer) -> None:
        super().__init__(net)
        self.body: Any = nn.Module()
        self.body.blocks, self.body.norm = body.blocks, body.norm
        self.heads = body.heads

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(tokens)
        turn = self.rotation(tokens, x)
        for block in self.body.blocks:
            x = x + self.attend(block, block.attention_norm(x), turn)
            gate, up = block.up(block.forward_norm(x)).chunk(2, -1)
            x = x + block.down(F.silu(gate) * up)
        return self.logits(self.body.norm(x))

    def rotation(self, tokens: Tensor, x: Tensor) -> Tensor:
        """See transformer.rotation; counted along the inputs, because a graph takes no sizes from them."""
        size = self.heads[1]
        pairs = torch.ones_like(x[0, 0, : size // 2]).cumsum(0) - 1
        rates = 10_000.0 ** -(2 * pairs / size)
        positions = torch.ones_like(tokens[:, 0]).cumsum(0) - 1
        angles = positions[:, None] * rates
        return torch.stack([angles.cos(), angles.sin()])

    def attend(self, block: Any, x: Tensor, turn: Tensor) -> Tensor:
        """See Block.attend, without a cache."""
        parts = block.attention_in(x).unflatten(-1, (3, *self.heads)).permute(2, 1, 3, 0, 4)
        query, key = rotate(parts[0], turn), rotate(parts[1], turn)
        out = F.scaled_dot_product_attention(query, key, parts[2], is_causal=True)
        return block.attention_out(out.permute(2, 0, 1, 3).flatten(2))  # type: ignore[no-any-return]
