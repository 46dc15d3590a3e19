"""What a configuration refuses by itself; what workloads and data refuse is tested with them."""

from __future__ import annotations

from typing import Any

import pytest

from rayexp.config import ExperimentConfig, parse
from rayexp.errors import UserError


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"data": {"bptt": 10}}, "bptt: shapes is images"),
        ({"data": {"max_train_tokens": 10}}, "max_train_tokens: shapes is images"),
        ({"workload": "language_model", "data": {"name": "python_docs", "max_train_samples": 9}}, "is text"),
        ({"workload": "language_model", "data": {"name": "python_docs", "augment": None}}, "augment: python_docs"),
    ],
)
def test_keys_of_the_other_kind_of_data(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(tree, ExperimentConfig, "test")


def test_a_dumped_configuration_is_one() -> None:
    config = parse({"data": {"image_size": 32}}, ExperimentConfig, "test")
    assert parse(config.model_dump(mode="json"), ExperimentConfig, "again") == config
