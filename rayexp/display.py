"""Show values that come from outside: names from datasets, numbers that are not finite.

The name of a class or an image, or a word of a text, may contain anything: escape sequences for a terminal, bytes that
are not UTF-8 (Python reads them as lone surrogates), a formula for a spreadsheet. Everything that is printed or written
for people goes through this module; JSON keeps names as they are.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from typing import Any

NOT_FINITE = "not finite"
LARGE = 1e6  # figures of this size and above are written with an exponent
# Characters that change the direction of the text around them (Unicode TR 36, section 2.10).
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def printable(text: str, keep: str = "") -> str:
    """The text with control characters and bytes that are not UTF-8 as backslash escapes: `\\x1b[2J`, `caf\\xe9`.

    Args:
        text: what to print.
        keep: control characters to leave as they are, such as the line ends of a message.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _obeyed(c) else _escape(c) for c in text)


def _obeyed(character: str) -> bool:
    """Whether it is a control character, a lone surrogate, a line separator or a direction mark."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _TURNING


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00  # the byte that the file system gave
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"


def csv_cell(text: str) -> str:
    """A CSV cell that no spreadsheet reads as a formula: an apostrophe precedes `=`, `+`, `-`, `@`, tab and line end.

    (OWASP, CSV Injection.) For text from outside; our own numbers need no apostrophe.
    """
    return ("'" if text.startswith(_FORMULA) else "") + printable(text)


def figure(value: float | None, form: str = ".4g") -> str:
    """Format a number: `not finite` for nan and infinity, an empty string for None. From LARGE on a fixed-point format
    gives an exponent; below it a general one gives none: `18,610`, not `1.861e+04`."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return NOT_FINITE
    if abs(value) >= LARGE:
        return f"{value:.3g}" if form.endswith("f") else f"{value:{form}}"
    shown = f"{value:{form}}"
    return f"{value:{'+' if form.startswith('+') else ''},.0f}" if form.endswith("g") and "e+" in shown else shown


# A number and the unit behind it, at the end of a word.
_UNIT = re.compile(r"(?<=[\d.]) (?=(?:%|ns|us|ms|s|min|h|B|kB|MB|GB|TB|GB/s|MB/s|Gbit/s|J|x|px|nats|points?)(?![\w/]))")


def tied(text: str) -> str:
    """The text with a space that breaks no line between a number and its unit: `62 %`, `12 min 5 s`, `3.2 GB/s`."""
    return _UNIT.sub("\u00a0", text)


def counted(number: float, noun: str, plural: str = "") -> str:
    """A number with its noun: `1 worker`, `1,200 images`, `0.5 cores`, and with a `plural` `2 classes`."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun if number == 1 else plural or noun + 's'}"


def with_workers(workers: int) -> str:
    """`with 2 workers`, or for 0 `in one process`."""
    return f"with {counted(workers, 'worker')}" if workers else "in one process"


def short(sha: str) -> str:
    """The beginning of a hash, as people compare it; JSON and files hold it whole."""
    return sha[:8]


COPIED = ("$ ", "go on with: ")  # before commands, which a terminal's user copies


def breadth(text: str) -> int:
    """The width of a line on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def folded(text: str, width: int | None) -> str:
    """The text in lines of at most `width` cells, cut between words only: a longer name, path or hash has a line to
    itself, and a command stays whole. None: as it is."""
    if width is None:
        return text
    return "\n".join(
        line if breadth(line) <= width or line.startswith(COPIED) else _fold(line, width) for line in text.split("\n")
    )


def _fold(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    first, *words = line.split()
    lines = [indent + first]
    for word in words:
        if breadth(lines[-1]) + 1 + breadth(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + word)
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """Convert a value for strict JSON: arrays to lists, numpy's numbers to Python's, NaN and infinity to null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    # numpy's arrays and numbers; recognised without an import, since most commands do not need numpy
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def seconds(value: float | None) -> str:
    """Format a duration: `0.412 s`, `38 s`, `12 min 5 s`, `3 h 20 min`."""
    if value is None or math.isnan(value):
        return ""
    if value < 120:
        return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
    minutes = round(value / 60)
    if value < 7200:
        whole = round(value)
        return f"{whole // 60} min {whole % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"


def short_names(class_names: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """`goldfish` of `goldfish, Carassius auratus`; all the words where several classes begin alike, and the id too
    where even they are alike."""
    names = [words.split(",")[0].strip() or key for key, words in class_names]
    for longer in ([words for _, words in class_names], [f"{words} ({key})" for key, words in class_names]):
        often = Counter(names)
        names = [longer[i] if often[name] > 1 else name for i, name in enumerate(names)]
    return tuple(names)
