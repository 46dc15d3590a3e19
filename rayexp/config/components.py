"""Components by name: the shipped ones, and what a name may refer to beside them. Nothing is imported here.

A name is that of a shipped component, that of an entry point which an installed package offers, or a reference:
    package.module:Name     in an installed package, or a module that travels with the run (`code`)
    ./file.py:Name          in a file, relative to the configuration that says so
`references.py` opens them; `code.py` says what of a user's code travels.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterable

from rayexp.errors import nearest

WORKLOADS = {
    "image_classification": "rayexp.workloads.image_classification.workload:ImageClassification",
    "language_model": "rayexp.workloads.language_model.workload:LanguageModel",
}
IMAGE_DATA = ("shapes", "tiny_imagenet", "folder")
TEXT_DATA = ("python_docs", "wikitext2", "text")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "step", "cosine", "onecycle", "plateau")
# Key -> the group of entry points in which its names are looked up.
GROUPS = {
    "workload": "rayexp.workloads",
    "model.name": "rayexp.models",
    "data.name": "rayexp.datasets",
    "optimizer.name": "rayexp.optimizers",
    "schedule.name": "rayexp.schedules",
}
REFERENCE = "package.module:Name or ./file.py:Name"
_IDENTIFIER = r"[^\W\d]\w*"
_NAME = re.compile(rf"{_IDENTIFIER}(?:\.{_IDENTIFIER})*")


def is_reference(name: str) -> bool:
    """Whether a name is a reference: it has a colon."""
    return ":" in name


def parts_of(reference: str) -> tuple[str, str]:
    """The module or file of a reference, and the name in it."""
    where, _, name = reference.rpartition(":")
    return where, name


def is_file(reference: str) -> bool:
    """Whether a reference names a file."""
    return is_reference(reference) and parts_of(reference)[0].endswith(".py")


def check_name(key: str, name: str, shipped: Iterable[str]) -> str:
    """Check a component's name as far as that goes without importing it.

    Args:
        key: the configuration's key that holds it.
        shipped: the names that come with rayexp.

    Raises:
        ValueError: it is neither shipped nor an entry point nor a reference.
    """
    if is_reference(name):
        where, inner = parts_of(name)
        if not (_NAME.fullmatch(inner) and (where.endswith(".py") or _NAME.fullmatch(where))):
            raise ValueError(f"{name!r} is no reference; expected {REFERENCE}")
    elif name not in shipped and name not in entry_points(GROUPS[key]):
        allowed = [*shipped, *entry_points(GROUPS[key])]
        listed = ", ".join([*allowed, REFERENCE])
        raise ValueError(f"unknown {key.partition('.')[0]} {name!r}{meant(name, allowed)}; allowed: {listed}")
    return name


def meant(name: str, allowed: Iterable[str]) -> str:
    """`' (did you mean X?)'` with the reference that a name lacks the colon of, or with the closest allowed name; or an
    empty string."""
    where, _, inner = name.rpartition(".")
    if where and inner == "py":
        return f" (did you mean {name}:Name, with the name of what it defines?)"
    if where and _NAME.fullmatch(name):
        return f" (did you mean ./{where.replace('.', '/')}.py:{inner} or {where}:{inner}?)"
    return nearest(name, allowed)


@functools.cache
def entry_points(group: str) -> dict[str, str]:
    """The names that installed packages offer in a group, with the reference of each."""
    return {point.name: point.value for point in importlib.metadata.entry_points(group=group)}
