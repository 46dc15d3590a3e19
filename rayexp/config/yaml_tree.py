"""YAML text and `KEY=VALUE` overrides as one tree of plain values; the field's type decides how a value is read.

If a field takes text, its value is text, whatever it looks like: a run may be called 123, 1e3 or 2026-11-23, and a
folder `null`. Refused are files that repeat a key, nest deeper than DEPTH levels, or expand (through aliases) to more
than SIZE values.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from rayexp.config import fields
from rayexp.errors import UserError

DEPTH = 32
SIZE = 10_000
_STR, _NULL, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
_INT, _FLOAT, _DATE = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
# YAML 1.1 would read 010 as eight, 1:30 as ninety, a date as no text, and 1e-3 as text.
_NUMBERS = {
    _INT: r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+",
    _FLOAT: r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers above and a limit on nesting."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.depth == DEPTH:
            raise yaml.YAMLError(f"nested deeper than {DEPTH} levels")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in (_INT, _FLOAT, _DATE)]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list("-+0123456789."))


def dump(tree: Mapping[str, Any]) -> str:
    """The tree as YAML; `read` (and any other reader of YAML 1.1) gives the same tree back."""
    return str(yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False))


def read(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    """Read a YAML file that describes a `kind`.

    Raises:
        UserError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        tree = copy.deepcopy(_parsed(path.read_text(encoding="utf-8"), kind))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not YAML ({_why(error)})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(tree).__name__}")
    return tree


def _why(error: Exception) -> str:
    """What is wrong with a text, and in which line; without the excerpt that PyYAML draws."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).partition(";")[0].split())
    # "while scanning ..." says what PyYAML was at; other contexts begin the sentence.
    context = "" if str(error.context or "while").startswith("while") else f"{error.context} "
    said = f"line {error.problem_mark.line + 1}: {context}{error.problem}"
    if r"'\t'" in said:
        return f"{said}; indent by spaces"
    return f"{said}; check the indentation" if "<block" in said else said


def set_override(tree: dict[str, Any], override: str, kind: type[BaseModel]) -> None:
    """Set `KEY=VALUE` (dotted keys) in the tree of a `kind`.

    Raises:
        UserError: it is not of this form, the value is not YAML, or a part of the key before the last is a single
            value.
    """
    key, equals, text = override.partition("=")
    *path, last = key.split(".")
    if not equals or not all((*path, last)):
        raise UserError(f"{override!r}: expected KEY=VALUE, for example epochs=2 or data.root=DIR")
    try:
        value = _value(text, fields.at(kind, (*path, last)))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"{override!r}: the value is not YAML; in a list or a mapping, text with other characters than letters and "
            "digits is safe in quotes, as 'KEY=[\"*\"]'"
        ) from error
    for part in path:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise UserError(f"{key}: {part} is a single value and has no keys under it")
    tree[last] = value


# ---------------------------------------------------------------------- text to values


def _value(text: str, field: Any) -> Any:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if not quoted and fields.is_text(field):
        return None if fields.may_be_null(field) and text in ("", "~", "null", "Null", "NULL") else text
    return _construct(text, field)


def _construct(text: str, field: Any) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return loader.construct_document(_as_text(node, field))
    finally:
        loader.dispose()


@functools.lru_cache(maxsize=512)  # the report of a comparison reads its runs' files a dozen times
def _parsed(text: str, kind: type[BaseModel]) -> Any:
    return _construct(text, kind)


def _check(root: Node) -> None:
    """Refuse repeated keys, and aliases that expand to too many values or to themselves."""
    count, waiting = 0, [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > SIZE:
            raise yaml.YAMLError(f"its aliases unfold to more than {SIZE:,} values")
        if depth > DEPTH:
            raise yaml.YAMLError(f"its aliases nest deeper than {DEPTH} levels")
        waiting += [(child, depth + 1) for child in _children(node)]
        if isinstance(node, MappingNode):
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, ScalarNode)):
                if key.value in seen:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1} says {key.value} a second time")
                seen.add(key.value)


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, SequenceNode):
        yield from node.value
    elif isinstance(node, MappingNode):
        for pair in node.value:
            yield from pair


def _as_text(node: Node, field: Any) -> Node:
    """The node, with every value tagged as text whose field takes text."""
    if isinstance(node, ScalarNode):
        if fields.is_text(field) and not (node.tag == _NULL and fields.may_be_null(field)):
            return ScalarNode(_STR, node.value, node.start_mark, node.end_mark)
    elif isinstance(node, SequenceNode):
        items = [_as_text(child, fields.item(field)) for child in node.value]
        return SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    elif isinstance(node, MappingNode):
        # A new node each time, so that no two keys share a value that `set_override` changes.
        pairs = []
        for key, value in node.value:
            if isinstance(key, ScalarNode) and key.tag != _MERGE:
                key = ScalarNode(_STR, key.value, key.start_mark, key.end_mark)
                value = _as_text(value, fields.at(field, key.value.split(".")))
            else:
                value = _as_text(value, field)
            pairs.append((key, value))
        return MappingNode(node.tag, pairs, node.start_mark, node.end_mark)
    return node
