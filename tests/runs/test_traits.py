"""What a run says of its workload: unit, kind and goals, and what older or damaged descriptions come to."""

from __future__ import annotations

from typing import Any

import pytest

from rayexp.runs.traits import IMAGES, TOKENS, Traits, traits_of
from rayexp.workloads.image_classification.workload import ImageClassification
from rayexp.workloads.language_model.workload import LanguageModel

OWN = Traits("samples", "samples", {"rmse": "min", "r2": "max"})


@pytest.mark.parametrize("name", ["image_classification", "language_model", "my.py:Regression", None])
def test_what_a_run_says_counts_whatever_its_workload_is_called(name: str | None) -> None:
    found = traits_of({"workload": name, **OWN.to_json()})
    assert found == OWN
    assert list(found.goals) == ["rmse", "r2"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("image_classification", IMAGES), ("language_model", TOKENS), ("my.py:Regression", Traits()), (None, Traits())],
)
@pytest.mark.parametrize(
    "damage", [{}, {"unit": 3, "kind": "", "goals": ["acc1"]}, {"goals": {"acc1": "up"}}, {"goals": {"acc1": []}}]
)
def test_a_run_that_does_not_say_it_has_its_workloads(name: str | None, wanted: Traits, damage: dict[str, Any]) -> None:
    assert traits_of({"workload": name, **damage}) == wanted


def test_an_old_run_has_the_traits_that_its_workload_still_has() -> None:
    for kind, traits in ((ImageClassification, IMAGES), (LanguageModel, TOKENS)):
        assert Traits(kind.unit, kind.kind, kind.goals) == traits
