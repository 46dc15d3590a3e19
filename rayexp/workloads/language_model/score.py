"""How surprised a language model is by a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rayexp.config import ExperimentConfig
from rayexp.data.text import EOS
from rayexp.engine.settings import threads
from rayexp.errors import UserError
from rayexp.workloads.language_model.generate import read_words
from rayexp.workloads.language_model.recurrent import LAYERS


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


def score(model: nn.Module, vocabulary: Sequence[str], config: ExperimentConfig, line: str) -> Score:
    """Score a line by itself, as if it followed a line's end. A recurrent model reads it from its first word on, any
    other in windows of `data.bptt` words, as in validation, with `model.context` words before each.

    Args:
        model: from int64[time, columns] to logits [time, columns, words].
        vocabulary: the words by number.
        config: that of the run.

    Raises:
        UserError: the text has several lines.
    """
    if "\n" in line.strip("\n"):
        raise UserError("predict: a text of several lines; each line is scored by itself: give them one by one")
    numbers, unknown = read_words(line, vocabulary, config)
    end = vocabulary.index(EOS)
    read = torch.tensor([end, *numbers, end])
    window = len(read) if config.model.name in LAYERS else config.data.bptt
    context = int(config.model.options.get("context", 0))
    total = 0.0
    with threads(1), torch.inference_mode():
        for start in range(0, len(read) - 1, window):
            targets = read[start + 1 : start + 1 + window]
            seen = read[max(0, start - context) : start + len(targets)]
            logits = model(seen[:, None])[-len(targets) :, 0]
            total += float(F.cross_entropy(logits.double(), targets, reduction="sum"))
    return Score(len(read) - 1, tuple(unknown), total / (len(read) - 1))
