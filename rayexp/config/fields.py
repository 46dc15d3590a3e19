"""The types that the fields of a configuration accept, and pydantic's errors as one line."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from rayexp.config.phrases import given, phrase
from rayexp.display import counted
from rayexp.errors import nearest


@dataclass(frozen=True, slots=True)
class KeysOf:
    """Metadata of a dict in `Annotated`: its keys are those of `kind`, nested or dotted."""

    kind: type[BaseModel]


def alternatives(field: Any) -> list[Any]:
    """The alternatives of an annotation (the members of a union), without the metadata of `Annotated`."""
    origin = get_origin(field)
    if origin is Annotated:
        return alternatives(get_args(field)[0])
    if origin in (Union, types.UnionType):
        return [option for part in get_args(field) for option in alternatives(part)]
    return [field]


def may_be_null(field: Any) -> bool:
    """Whether the field accepts null."""
    return types.NoneType in alternatives(field)


def is_text(field: Any) -> bool:
    """Whether the field accepts only text (a path, or one of several literals), or also null."""
    options = [option for option in alternatives(field) if option is not types.NoneType]
    return bool(options) and all(
        option in (str, Path)
        or (get_origin(option) is Literal and all(isinstance(literal, str) for literal in get_args(option)))
        for option in options
    )


def item(field: Any) -> Any:
    """The annotation of a list's items; Any where the field does not accept a list."""
    found = [get_args(option)[0] for option in alternatives(field) if get_origin(option) in (tuple, list)]
    return found[0] if len(found) == 1 else Any


def at(field: Any, path: Sequence[str]) -> Any:
    """The annotation of the field under these keys; Any where there is no such field."""
    for part in path:
        models = models_of(field)
        found = [model.model_fields[part] for model in models if part in model.model_fields]
        if not found:
            return Any
        # pydantic splits `Annotated` into the annotation and its metadata.
        metadata = tuple(found[0].metadata)
        field = Annotated[(found[0].annotation, *metadata)] if metadata else found[0].annotation
    return field


def explain(error: ValidationError, kind: type[BaseModel], prefix: str = "") -> str:
    """The first error of pydantic's as one line: the key, what is wrong, and what is allowed."""
    errors = error.errors(include_url=False)
    parts = _key(errors[0]["loc"])
    # A union gives errors for each of its members: those that lead deepest are of the one that was meant.
    own = [e for e in errors if _key(e["loc"])[: len(parts)] == parts]
    first = max(own, key=lambda e: len(_key(e["loc"])))
    parts = _key(first["loc"])
    key = ".".join([prefix, *parts] if prefix else parts)
    if first["type"] == "extra_forbidden":
        allowed = list(_section(kind, parts[:-1]).model_fields)
        elsewhere = _nested(kind, parts) or " or ".join(_places(kind, parts[-1]))
        meant = f" (did you mean {elsewhere}?)" if elsewhere else nearest(parts[-1], allowed)
        return f"unknown key {key}{meant}; allowed: {', '.join(allowed)}"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        places = [e["loc"][-1] for e in errors if e["type"] == "missing" and e["loc"][:-1] == first["loc"][:-1]]
        message = f"expected at least {counted(max(map(int, places)) + 1, 'value')}{given(first['input'])}"
        key = key.rpartition(".")[0]
    elif first["type"] == "model_type":
        message = f"expected keys under it ({', '.join(_section(kind, parts).model_fields)}){given(first['input'])}"
    else:
        message = phrase([e for e in own if _key(e["loc"]) == parts])
    return f"{key}: {message}" if key else message


def _nested(kind: type[BaseModel], parts: Sequence[str]) -> str:
    """`data: {root: ...}` for the key `data.root`, which is dotted on the command line alone; empty for another one."""
    *outer, last = parts[-1].split(".")
    if not outer or at(kind, [*parts[:-1], *outer, last]) is Any:
        return ""
    shown = f"{last}: ..."
    for part in reversed(outer):
        shown = f"{part}: {{{shown}}}"
    return shown


def _places(kind: type[BaseModel], name: str) -> list[str]:
    """The dotted keys that end in this name, outside of lists."""
    found = [name] if name in kind.model_fields else []
    for part in kind.model_fields:
        field = at(kind, [part])
        if item(field) is Any:
            found += [f"{part}.{key}" for model in models_of(field) for key in _places(model, name)]
    return found


def _key(location: Sequence[str | int]) -> list[str]:
    """The key as the user knows it: pydantic's location without the members of unions."""
    return [str(part) for part in location if not re.fullmatch(r".*[\[\]()].*|int|bool|constrained-\w+", str(part))]


def _section(kind: type[BaseModel], parts: Sequence[str]) -> type[BaseModel]:
    """The model class under a dotted key (positions in lists are skipped)."""
    for part in parts:
        if part.isdecimal() or part not in kind.model_fields:
            continue
        found = models_of(kind.model_fields[part].annotation)
        if found:
            kind = found[0]
    return kind


def models_of(field: Any) -> list[type[BaseModel]]:
    """The model classes whose keys are allowed under a field with this annotation."""
    if isinstance(field, type) and issubclass(field, BaseModel):
        return [field]
    if isinstance(field, KeysOf):
        return [field.kind]
    return [model for part in get_args(field) for model in models_of(part)]


def listed(value: Any) -> Any:
    """A list in place of the one name in it, and without repetitions."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return list(dict.fromkeys(names))
    return names
