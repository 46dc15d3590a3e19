"""What pydantic finds wrong, in the words of a configuration: `expected a whole number, got 'x'`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayexp.display import counted

LONGEST = 60  # characters of a value that are shown
FEW = 4  # numbers of a list that are shown

# Types of pydantic's errors (https://docs.pydantic.dev/latest/errors/validation_errors/) that our fields can give.
EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping, as {{key: value}}",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a value above {gt}",
    "greater_than_equal": "a value of at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_type": "a whole number",
    "invalid_key": "text as a key",
    "less_than": "a value below {lt}",
    "less_than_equal": "a value of at most {le}",
    "literal_error": "{expected}",
    "path_type": "a path",
    "string_type": "text",
    "tuple_type": "a list, as [1, 2]",
}
# Patterns of text, by the regular expression of the field.
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
PATTERNS = {NAME: "1 to 64 letters, digits, '_', '.' or '-', the first a letter or a digit"}


def phrase(errors: Sequence[Mapping[str, Any]]) -> str:
    """The errors of one field (one for each type that it accepts) as the end of a line: what is expected, and what was
    given."""
    found = list(dict.fromkeys(_expected(error) for error in errors))
    first = errors[0]
    if first["type"] == "missing":
        return "is missing"
    if first["type"] in ("value_error", "assertion_error"):
        said = str(first["msg"]).partition(", ")[2]  # after pydantic's `Value error, `: our own validators'
        return said if repr(first["input"]) in said else said + given(first["input"])
    return f"expected {' or '.join(found)}" + (given(first["input"]) if "got " not in found[0] else "")


def _expected(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return PATTERNS.get(context["pattern"], f"text of the form {context['pattern']}")
    if kind in ("too_short", "too_long"):
        bound, limit = (
            ("at least", context["min_length"]) if kind == "too_short" else ("at most", context["max_length"])
        )
        return f"{bound} {counted(limit, 'value')}, got {context['actual_length']}"
    known = EXPECTED.get(kind, "another value")
    numbers = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    return known.format_map(numbers).replace("'", "") if kind == "literal_error" else known.format_map(numbers)


def given(value: Any) -> str:
    """`, got 'x'`: the value as YAML has it, a long one cut; empty for a mapping, which the key names already."""
    if value is None or isinstance(value, bool):
        shown = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, list | tuple):
        few = len(value) <= FEW and all(type(one) in (int, float) for one in value)
        shown = f"[{', '.join(map(_short, value))}]" if few else f"a list of {len(value)}"
    elif isinstance(value, str | int | float):
        shown = _short(value)
    else:
        return ""
    return f", got {shown}"


def _short(value: str | int | float) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an int with more digits than Python prints
        return "a number of thousands of digits"
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."
