"""Whatever a field is given, what is wrong is one line in our own words: none of pydantic's, and none of Python's."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
from pydantic import BaseModel, Field, ValidationError

from rayexp.config import CompareConfig, ExperimentConfig
from rayexp.config.fields import explain
from rayexp.config.phrases import EXPECTED, LONGEST, PATTERNS, given
from rayexp.workloads.image_classification.workload import Options
from rayexp.workloads.language_model.recurrent import RecurrentOptions
from rayexp.workloads.language_model.transformer import TransformerOptions

VALUES: list[Any] = [
    *("x", "", "1" * 5000, "a\nb", b"x", -1, 0, 2**70, 10**400, 0.5, -0.5, 1.5, float("nan"), float("inf"), True, None),
    *([], [1], [1, 2], [2, 1], [-1, -1], [1, 2, 3], ["x", "y"], [{}], [{"x": 1}], ["exact", "x"]),
    *({}, {"x": 1}, {"x": "y"}, {1: 2}, {"cpu": "x"}, {"cpu": -1}, {"latency_us": 0}),
]
ROOTS: dict[type[BaseModel], dict[str, Any]] = {
    ExperimentConfig: {},
    CompareConfig: {"base": "x", "scaling": [{}]},
    Options: {"name": "x"},
    RecurrentOptions: {"name": "lstm"},
    TransformerOptions: {"name": "transformer"},
}
FOREIGN = re.compile(
    r"[Ii]nput|valid\b|pydantic|://|[Ss]tring|[Tt]uple|[Dd]ictionary|[Ii]nteger|[Bb]oolean|instance|required|constrained"
    r"|permitted|parse|Value error|another value|\b(None|True|False|str|int|float|bool|dict)\b|\n"
)


def places(kind: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, field in kind.model_fields.items():
        yield (name,)
        annotation = field.annotation
        for part in (annotation, *typing.get_args(annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from ((name, *below) for below in places(part))


def wrong(kind: type[BaseModel]) -> Iterator[tuple[str, str, list[str]]]:
    """Key, line and pydantic's types of errors, for all fields and values that do not fit."""
    for place in places(kind):
        for value in VALUES:
            tree: Any = {place[-1]: value}
            for name in reversed(place[:-1]):
                tree = {name: [tree] if name == "scaling" and kind is CompareConfig else tree}
            try:
                kind.model_validate({**ROOTS[kind], **tree})
            except ValidationError as error:
                yield ".".join(place), explain(error, kind), [e["type"] for e in error.errors()]


@pytest.mark.parametrize("kind", ROOTS)
def test_every_field_says_in_one_line_what_it_expects(kind: type[BaseModel]) -> None:
    found = list(wrong(kind))
    assert {name for name, _, _ in found} >= {".".join(place) for place in places(kind)} - {
        "overrides",
        "model",
        "name",
    }
    for name, line, _ in found:
        said = line.replace(r"\n", "").partition("; allowed: ")[0]
        assert not FOREIGN.search(re.sub(r"\(.*?\)", "", said)), line
        assert ": expected " not in line or len(line) < 400 + LONGEST, line
        assert name.split(".")[0] in line, line


def test_every_entry_of_the_table_can_happen() -> None:
    types = {kind for root in ROOTS for _, _, kinds in wrong(root) for kind in kinds}
    other = {
        "missing",
        "value_error",
        "extra_forbidden",
        "model_type",
        "string_pattern_mismatch",
        "too_long",
        "too_short",
    }
    assert types == EXPECTED.keys() | other


def test_every_pattern_has_words() -> None:
    patterns = {
        constraint.pattern
        for kind in ROOTS
        for field in kind.model_fields.values()
        for constraint in field.metadata
        if getattr(constraint, "pattern", None)
    }
    assert patterns == PATTERNS.keys()


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("epochs", "x", "epochs: expected a whole number, got 'x'"),
        ("epochs", 0.5, "epochs: expected a whole number, got 0.5"),
        ("epochs", None, "epochs: expected a whole number, got null"),
        ("epochs", [1, 2], "epochs: expected a whole number, got [1, 2]"),
        ("epochs", -1, "epochs: expected a value above 0, got -1"),
        ("epochs", True, "epochs: true and false are not allowed here, got true"),
        ("label_smoothing", 1, "label_smoothing: expected a value below 1, got 1"),
        ("max_failures", -1, "max_failures: expected a value of at least 0, got -1"),
        ("lr", "x", "lr: expected a number, got 'x'"),
        ("lr", "x" * 100, f"lr: expected a number, got {'x' * 100!r:.60}..."),
        ("compile", "x", "compile: expected true or false, got 'x'"),
        ("reduction", "x", "reduction: expected exact or ddp, got 'x'"),
        (
            "name",
            "a b",
            "name: expected 1 to 64 letters, digits, '_', '.' or '-', the first a letter or a digit, got 'a b'",
        ),
        ("optimizer", {"betas": [0.9]}, "optimizer.betas: expected at least 2 values, got [0.9]"),
        ("optimizer", {"betas": []}, "optimizer.betas: expected at least 2 values, got []"),
        ("optimizer", {"betas": [0.9, 0.9, 0.9]}, "optimizer.betas: expected at most 2 values, got 3"),
        ("optimizer", {"betas": 0.9}, "optimizer.betas: expected a list, as [1, 2], got 0.9"),
        ("data", {"root": 3}, "data.root: expected a path, got 3"),
    ],
)
def test_the_words(key: str, value: Any, line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ExperimentConfig.model_validate({key: value})
    assert explain(caught.value, ExperimentConfig) == line


def test_what_pydantic_may_add_is_said_without_its_words() -> None:
    class Later(BaseModel):
        when: Any = Field(default=None)
        day: date | None = None

    with pytest.raises(ValidationError) as caught:
        Later.model_validate({"day": "x"})
    assert explain(caught.value, Later) == "day: expected another value, got 'x'"


def test_values_as_yaml_has_them() -> None:
    values = (None, True, 1.5, "x", [1, 2.5], [1] * 5, ["a"], {})
    assert [given(value) for value in values] == [
        *(
            ", got null",
            ", got true",
            ", got 1.5",
            ", got 'x'",
            ", got [1, 2.5]",
            ", got a list of 5",
            ", got a list of 1",
            "",
        ),
    ]
    assert given(10**5000) == ", got a number of thousands of digits"
