"""Text from a language model, word by word; the hidden state or the key-value cache holds what the model has read.

Always on the CPU and with keyed draws, so that a seed gives the same text again. Another processor may round the last
bit of a logit differently; where a draw falls between the two, the text differs from that word on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rayexp.config import ExperimentConfig
from rayexp.data.text import EOS, UNK
from rayexp.engine import order
from rayexp.engine.settings import models
from rayexp.errors import RunError, UserError
from rayexp.runs.run import Run
from rayexp.workloads.language_model.model import MODELS, LanguageNet, build
from rayexp.workloads.own_model import is_own
from rayexp.workloads.saved import read_state

READ_AT_ONCE = 256  # words of a prompt


@dataclass(frozen=True, slots=True)
class TextGenerator:
    """A trained model and its vocabulary.

    Attributes:
        net: in eval mode, on the CPU.
        vocabulary: the words by number.
        config: the run's.
        weights_sha: hash of the weights.
    """

    net: LanguageNet
    vocabulary: tuple[str, ...]
    config: ExperimentConfig
    weights_sha: str


def open_generator(run: Run, epoch: int) -> TextGenerator:
    """The model after an epoch of a run. Needs the run directory only, not the data. Compute with one thread
    (`engine.settings.threads`), since their number may change the last bit of a logit.

    Raises:
        UserError: the run is of another workload, or the epoch has no checkpoint.
        RunError: the checkpoint is damaged.
    """
    config = run.config()
    if config.workload != "language_model" or is_own("model.name", config.model.name, lambda: MODELS):
        found = ", ".join(dict.fromkeys((config.workload, config.subject)))
        raise UserError(f"{run.id}: generate needs a language_model ({', '.join(MODELS)}), this run is of {found}")
    state = read_state(run, epoch)
    vocabulary = tuple(run.data().get("vocabulary", ()))
    if not vocabulary:
        raise UserError(f"{run.data_path}: holds no vocabulary")
    with models():
        net = build(config, len(vocabulary))
    try:
        net.load_state_dict(state.weights())
    except RuntimeError as error:
        raise RunError(f"{run.checkpoint(epoch)}: does not fit the run's model ({error})") from error
    return TextGenerator(net.eval(), vocabulary, config, str(state.fields["weights_sha"]))


def read_prompt(prompt: str, generator: TextGenerator) -> tuple[list[int], list[str]]:
    """A prompt as word numbers, and the words that the model does not know (read as `<unk>` where the vocabulary has
    that, otherwise left out)."""
    return read_words(prompt, generator.vocabulary, generator.config)


def read_words(text: str, vocabulary: Sequence[str], config: ExperimentConfig) -> tuple[list[int], list[str]]:
    """`read_prompt`, with the vocabulary and the configuration of a run."""
    if config.data.name == "python_docs":
        from rayexp.data.python_docs import tokenise

        text = tokenise(text)
    number = {word: n for n, word in enumerate(vocabulary)}
    words = text.split()
    found = [number.get(word, number.get(UNK)) for word in words]
    return [n for n in found if n is not None], [word for word in words if word not in number]


def generate(
    net: LanguageNet,
    start: Sequence[int],
    words: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Word numbers, one after another, each drawn from the model's distribution after all words before it.

    Args:
        net: in eval mode, on the CPU.
        start: the words to begin with, at least one.
        words: how many to generate.
        temperature: divides the logits; 0 takes the likeliest word.
        top_k: only the k likeliest words are drawn.
        seed: word i is drawn with the uniform number of (seed, i).

    Raises:
        UserError: the temperature is not a number from 0.
        RunError: the model's output is not finite.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature: {temperature} is not a number from 0")
    state = net.body.begin(1, torch.device("cpu"))
    draws = order.uniform(order.key(seed, "generate"), np.arange(words), 1)[:, 0]
    fresh = torch.tensor(start, dtype=torch.int64)[:, None]
    with torch.inference_mode():
        for draw in draws:
            for part in torch.split(fresh, READ_AT_ONCE):
                logits, state = net.advance(part, state)
            if not bool(logits.isfinite().all()):
                raise RunError("the model's output is not finite, so there is no word to choose")
            word = choose(logits[0].double().numpy(), float(draw), temperature, top_k)
            yield word
            fresh = torch.tensor([[word]])


def choose(logits: NDArray[np.float64], draw: float, temperature: float = 1.0, top_k: int | None = None) -> int:
    """The word at which the cumulative probability, in the order of the vocabulary, passes `draw` in [0, 1)."""
    if temperature == 0:
        return int(logits.argmax())
    allowed = np.arange(len(logits))
    if top_k is not None and top_k < len(logits):
        # Of equal logits the earlier words are taken.
        allowed = np.sort(np.argsort(-logits, kind="stable")[:top_k])
    scaled = logits[allowed] / temperature
    sums = np.exp(scaled - scaled.max()).cumsum()
    chosen = int(np.searchsorted(sums, draw * sums[-1], side="right"))
    return int(allowed[min(chosen, len(allowed) - 1)])


def lines(words: Sequence[str]) -> str:
    """Words as text, with a new line at every `<eos>` and blanks elsewhere."""
    text: list[list[str]] = [[]]
    for word in words:
        if word == EOS:
            text.append([])
        else:
            text[-1].append(word)
    return "".join(" ".join(line) + "\n" for line in text)
