"""A word-level language model: word vectors, a body (recurrent or transformer), and the output layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, explain
from rayexp.config.components import REFERENCE, meant
from rayexp.engine import cpu, order
from rayexp.engine.rng import Dropout
from rayexp.errors import UserError
from rayexp.workloads.language_model.recurrent import LAYERS, HiddenState, Recurrent, RecurrentOptions
from rayexp.workloads.language_model.transformer import KeyValueCache, Transformer, TransformerOptions

BodyState = HiddenState | KeyValueCache
MODELS = (*LAYERS, "transformer")
EMBEDDING_RANGE = 0.1  # uniform, as in pytorch/examples word_language_model


def options_of(config: ExperimentConfig) -> RecurrentOptions | TransformerOptions:
    """The checked options of the `model` section.

    Raises:
        UserError: names the key and what is allowed.
    """
    name = config.model.name
    if name not in MODELS:
        allowed = ", ".join((*MODELS, REFERENCE))
        raise UserError(f"model.name: unknown model {name!r}{meant(name, MODELS)}; allowed: {allowed}")
    kind: type[RecurrentOptions | TransformerOptions] = (
        TransformerOptions if name == "transformer" else RecurrentOptions
    )
    options: RecurrentOptions | TransformerOptions
    try:
        options = kind.model_validate(config.model.options)
    except ValidationError as error:
        raise UserError(explain(error, kind, "model")) from None
    if isinstance(options, RecurrentOptions) and options.tied and options.nhid != options.emsize:
        raise UserError(f"model.tied: needs nhid = emsize, got nhid {options.nhid} and emsize {options.emsize}")
    return options


def build(config: ExperimentConfig, words: int) -> LanguageNet:
    """A freshly initialised model on the CPU, a function of the configuration and the vocabulary's size.

    Each parameter is drawn by itself, from (seed, "init", name). All are uniform, since uniform numbers are the same on
    every processor; normal ones go through a logarithm that is not.
    """
    options = options_of(config)
    with torch.device("meta"):  # torch's own initialisation would move the global generator
        net = LanguageNet(config.model.name, options, config.data.bptt, words, config.cpu_kernels)
    net.to_empty(device="cpu")
    ranges = {f"body.{name}": r for name, r in net.body.ranges().items()}
    wide = EMBEDDING_RANGE if isinstance(options, RecurrentOptions) else 0.02 * 3**0.5
    ranges |= {"encoder.weight": wide, "decoder.weight": wide}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name in ranges:
                generator = torch.Generator().manual_seed(order.key(config.seed, f"init/{name}"))
                parameter.uniform_(-ranges[name], ranges[name], generator=generator)
            else:
                parameter.fill_(0.0 if name == "decoder.bias" else 1.0)
    return net


class LanguageNet(nn.Module):
    """The model. Activations are [time, columns, features].

    Attributes:
        encoder: the word vectors.
        drop: dropout on the word vectors and on the body's output.
        body: what reads the words.
        decoder: the output layer.
    """

    def __init__(
        self, name: str, options: RecurrentOptions | TransformerOptions, window: int, words: int, cpu_kernels: bool
    ) -> None:
        super().__init__()
        self.encoder = Embedding(words, options.emsize, cpu_kernels)
        self.drop = Dropout(options.dropout, dim=1)
        self.body: Recurrent | Transformer
        if isinstance(options, TransformerOptions):
            self.body = Transformer(options, options.context + window)
        else:
            self.body = Recurrent(name, options)
        self.decoder = Decoder(self.body.size, words, options.tied, cpu_kernels)

    def advance(self, tokens: Tensor, state: BodyState) -> tuple[Tensor, BodyState]:
        """Read words and predict the next one: the logits [columns, words], and the state (see `body.begin`)."""
        x, state = self.body(self.encoder(tokens), state)
        logits: Tensor = self.decoder(x[-1], self.encoder.weight)
        return logits, state

    def forward(self, tokens: Tensor, targets: Tensor | None = None, state: BodyState = ()) -> tuple[Tensor, BodyState]:
        """Read words, and predict the next one after each of them.

        Args:
            tokens: int64[time, columns].
            targets: int64[time * columns], the words to predict at the last positions.
            state: what `body.begin` or an earlier call returned; () starts anew.

        Returns:
            The logits [time, columns, words] without targets, the loss of each target in nats with them; and the state
            after the last word.
        """
        x = self.drop(self.encoder(tokens))
        x, state = self.body(x, state)
        if targets is not None:
            x = x[len(x) - targets.numel() // tokens.shape[1] :]
        return self.decoder(self.drop(x), self.encoder.weight, targets), state


class Embedding(nn.Module):
    """Word vectors."""

    def __init__(self, words: int, size: int, cpu_kernels: bool) -> None:
        super().__init__()
        self.cpu_kernels = cpu_kernels
        self.weight = nn.Parameter(torch.empty(words, size))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64[...] -> [..., size]."""
        return cpu.embedding(tokens, self.weight, self.cpu_kernels and self.training)


class Decoder(nn.Module):
    """The output layer. A tied one has no weight of its own, so that the weight has one name in checkpoints."""

    only_products = True  # see engine/rounding.py

    def __init__(self, size: int, words: int, tied: bool, cpu_kernels: bool) -> None:
        super().__init__()
        self.cpu_kernels = cpu_kernels
        self.weight = None if tied else nn.Parameter(torch.empty(words, size))
        self.bias = nn.Parameter(torch.empty(words))

    def forward(self, x: Tensor, encoder_weight: Tensor, targets: Tensor | None = None) -> Tensor:
        """[time, columns, size] -> logits, or the losses of the targets."""
        weight = encoder_weight if self.weight is None else self.weight
        if targets is None:
            return F.linear(x, weight, self.bias)
        return cpu.token_losses(x.flatten(0, 1), weight, self.bias, targets, self.cpu_kernels)
