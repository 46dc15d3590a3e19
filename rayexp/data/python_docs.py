"""Python's own language reference (`pydoc_data.topics`): a small English text that needs no file.

A line is a paragraph; a token is a word, or one punctuation mark with its repetitions (`...`, `>>>`). The topics are
split by the hash of their names, about 8 : 1 : 1. Words that occur only once in the training text become `<unk>`.
Another version of Python has another text, and therefore another data hash.
"""

from __future__ import annotations

import functools
import hashlib
import re

import numpy as np
from numpy.typing import NDArray

from rayexp.config import DataConfig
from rayexp.data import TextData, text
from rayexp.errors import UserError

TOKEN = re.compile(r"\w+(?:['’]\w+)*|([^\w\s])\1*")
UNDERLINE = re.compile(r"^\s*[*=~^#\-]{3,}\s*$", re.MULTILINE)


def open_data(config: DataConfig) -> TextData:
    """The reference, limited to the configured number of tokens.

    Raises:
        UserError: this Python was installed without its documentation topics.
    """
    return text.capped(*_tokens(), config)


def split_of(topic: str) -> str:
    """`train`, `valid` or `test`, by the hash of a topic's name."""
    return ("valid", "test", *["train"] * 8)[int(hashlib.sha256(topic.encode()).hexdigest(), 16) % 10]


def tokenise(topic: str) -> str:
    """A topic as lines of tokens separated by blanks: one paragraph per line, titles without their underlines."""
    paragraphs = re.split(r"\n\s*\n", UNDERLINE.sub("", topic))
    lines = (" ".join(match[0] for match in TOKEN.finditer(paragraph)) for paragraph in paragraphs)
    return "".join(f"{line}\n" for line in lines if line)


@functools.cache
def _tokens() -> tuple[tuple[str, ...], dict[str, NDArray[np.int32]]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "data.name: this Python has no pydoc_data.topics, so there is no python_docs; use text"
        ) from None
    texts = dict.fromkeys(text.SPLITS, "")
    for name in sorted(topics):
        texts[split_of(name)] += tokenise(topics[name])
    splits = {name: text.words(lines, f"python_docs {name}") for name, lines in texts.items()}
    return text.encode(splits, known=("train",), min_count=2)
