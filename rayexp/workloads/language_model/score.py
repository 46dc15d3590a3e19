"""How surprised a language model is by a line of text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayexp.data.text import EOS
from rayexp.engine.settings import threads
from rayexp.errors import UserError
from rayexp.workloads.language_model.generate import TextGenerator, read_prompt
from rayexp.workloads.language_model.model import options_of
from rayexp.workloads.language_model.transformer import Transformer, TransformerOptions


@dataclass(frozen=True, slots=True)
class Score:
    """Of one line.

    Attributes:
        tokens: that were predicted: the words that the model reads, and the end of the line.
        unknown: words that are not in the vocabulary, in their order.
        loss: their mean in nats.
    """

    tokens: int
    unknown: tuple[str, ...]
    loss: float


def score(writer: TextGenerator, line: str) -> Score:
    """Judge a line by itself, as if it followed a line's end. A transformer reads it in windows, as in validation.

    Raises:
        UserError: the text has several lines.
    """
    if "\n" in line.strip("\n"):
        raise UserError("a text of several lines; each is judged by itself: give them one by one")
    numbers, unknown = read_prompt(line, writer)
    end = writer.vocabulary.index(EOS)
    read = torch.tensor([end, *numbers, end])[:, None]
    options, window = options_of(writer.config), writer.config.data.bptt
    context = options.context if isinstance(options, TransformerOptions) else 0
    if not isinstance(writer.net.body, Transformer):
        window = len(read)
    total = 0.0
    with threads(1), torch.inference_mode():
        for start in range(0, len(read) - 1, window):
            stop = min(start + window, len(read) - 1)
            losses, _ = writer.net(read[max(0, start - context) : stop], read[start + 1 : stop + 1].reshape(-1))
            total += float(losses.double().sum())
    return Score(len(read) - 1, tuple(unknown), total / (len(read) - 1))
