"""What run.json says of a GPU, in words."""

from __future__ import annotations

import pytest

from rayexp.runs.residency import Residency, residency_of, steps_of


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Residency(True, 1_283_000_000, 80 * 10**9, "auto"), "1.28 GB, kept in the GPU's memory"),
        (
            Residency(False, 1_283_000_000, 2 * 10**9, "auto"),
            "1.28 GB, sent to the GPU batch by batch (2.00 GB of the GPU's memory is free)",
        ),
        (Residency(False, 3 * 10**6, 9, False), "3.00 MB, sent to the GPU batch by batch (data.resident is false)"),
    ],
)
def test_how_samples_reach_a_gpu(found: Residency, said: str) -> None:
    assert str(found) == said
    assert residency_of({"residency": found.to_json()}) == found


@pytest.mark.parametrize("meta", [{}, {"residency": None}, {"residency": "much"}, {"residency": {"kept": True}}])
def test_where_nothing_is_said_nothing_is_shown(meta: dict[str, object]) -> None:
    assert residency_of(meta) is None


@pytest.mark.parametrize(
    ("capture", "said"),
    [
        (None, ""),
        ("", ""),
        ("graph", "replayed from CUDA graphs"),
        ("eager: capture is false", "launched one by one (eager: capture is false)"),
    ],
)
def test_how_steps_were_run(capture: str | None, said: str) -> None:
    assert steps_of({"capture": capture}) == said
    assert steps_of({}) == ""
