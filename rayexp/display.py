"""How values that we did not choose are shown: names from data sets, numbers that are not finite.

A class, an image or a word of a text may hold anything: escape sequences that a terminal obeys, bytes that are no
UTF-8 (Python reads them as lone surrogates), a spreadsheet's formula. Everything that is printed or written for people
passes through here; JSON keeps names as they are.
"""

from __future__ import annotations

import math
import unicodedata
from typing import Any

NOT_FINITE = "not finite"
LARGE = 1e6  # figures from here on are written with an exponent
# Turn the direction of the text around them (Unicode TR 36, section 2.10).
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def printable(text: str, keep: str = "") -> str:
    """The text with what a terminal would obey, and what is no UTF-8, as backslash escapes: `\\x1b[2J`, `caf\\xe9`.

    Args:
        keep: control characters that are meant, such as the line ends of a message.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _obeyed(c) else _escape(c) for c in text)


def _obeyed(character: str) -> bool:
    """Control characters, lone surrogates, separators of lines, marks of direction."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _TURNING


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00  # the byte that the file system gave
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"


def csv_cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: an apostrophe stands before `=`, `+`, `-`, `@`, tab and line end.

    (OWASP, CSV Injection.) For names and words; numbers of our own need none.
    """
    return ("'" if text.startswith(_FORMULA) else "") + printable(text)


def figure(value: float | None, form: str = ".4g") -> str:
    """A number in this format, `not finite`, or nothing for None; where a fixed one would run to many digits, with an
    exponent."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{value:.3g}" if form.endswith("f") and abs(value) >= LARGE else f"{value:{form}}"


def plain(value: Any) -> Any:
    """A value for strict JSON: arrays become lists, numpy's numbers Python's, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    # numpy's, without importing it: most commands do without
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def seconds(value: float | None) -> str:
    """`0.412 s`, `38 s`, `12 min 5 s`, `3 h 20 min`."""
    if value is None or math.isnan(value):
        return ""
    if value < 120:
        return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
    minutes = round(value / 60)
    if value < 7200:
        whole = round(value)
        return f"{whole // 60} min {whole % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"
