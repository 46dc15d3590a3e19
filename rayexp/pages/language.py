"""What the page of a language model says beside its curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LanguageSample:
    """A checkpoint on the test text, and a text that it writes.

    Attributes:
        epoch: of the checkpoint.
        test: `test_loss` in nats and `test_ppl`; None where there is no telling.
        why_no_test: why; empty where there is.
        text: what `rayexp generate RUN@epoch --words WORDS` writes; empty where it cannot.
        why_no_text: why; empty where it can.
        words: length of the text.
    """

    epoch: int
    test: Mapping[str, float] | None
    why_no_test: str
    text: str
    why_no_text: str
    words: int
