"""What a job has printed, made harmless for the terminal on which it is shown.

A job prints what it was given: names from data sets, messages of libraries. None of it may clear the screen, set the
window's title or write into the clipboard. So control sequences are shown as `\\x1b[2J`, with three exceptions. Line
ends and tabs are kept. Colours are left out: a job does not print to a terminal, so only libraries that are forced to
colour do, and escaped, they would make each of their lines unreadable. The carriage return is kept: with it a progress
bar draws its own line again, and it reaches no other line.
"""

from __future__ import annotations

import re
from typing import TextIO

from rayexp.display import printable

_KEPT = "\n\t\r"
_COLOUR = re.compile(r"\x1b\[[0-9;:]{0,32}m")
_UNFINISHED_COLOUR = re.compile(r"\x1b(\[[0-9;:]{0,32})?\Z")


class JobOutput:
    """Writes a job's output to a stream, in pieces that may end anywhere, also within a control sequence."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._rest = ""  # the beginning of what may become a colour

    def write(self, text: str) -> None:
        """Write the next piece."""
        text = self._rest + text
        unfinished = _UNFINISHED_COLOUR.search(text)
        end = unfinished.start() if unfinished else len(text)
        self._rest = text[end:]
        self._write(text[:end])

    def close(self) -> None:
        """Write what was held back; the stream stays open."""
        rest, self._rest = self._rest, ""
        self._write(rest)

    def _write(self, text: str) -> None:
        self.stream.write(printable(_COLOUR.sub("", text), keep=_KEPT))
        self.stream.flush()
