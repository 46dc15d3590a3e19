"""docs/configuration.md says what the configuration's classes say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
from pydantic import Field, PositiveInt

from rayexp.config import Section

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("configuration", DOCS / "configuration.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(generator: ModuleType) -> None:
    found = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert found == generator.page(), "run: python docs/configuration.py"


def test_every_key_has_a_meaning(generator: ModuleType) -> None:
    assert [line for line in generator.page().splitlines() if line.endswith("|  |")] == []


class Inner(Section):
    """Keys under another."""

    depth: PositiveInt | tuple[PositiveInt, PositiveInt] = 2
    """How deep."""


class Outer(Section):
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """A share | of something."""
    inner: Inner = Inner()
    needed: str


def test_a_field_that_changes_changes_the_page(generator: ModuleType) -> None:
    assert generator.table(Outer).splitlines()[3:] == [
        "| `rate` | number | `0.5` | ≥ 0, < 1 | A share \\| of something. |",
        "| **`inner`** | keys |  |  | Keys under another. |",
        "| `inner.depth` | integer or [integer, integer] | `2` | > 0 or each > 0 | How deep. |",
        "| `needed` | text | required |  |  |",
    ]
