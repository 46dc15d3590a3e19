"""What a run pins in its process is restored afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import runtime
from rayexp.engine.settings import kept

CPU = torch.device("cpu")


def settings() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "benchmark": torch.backends.cudnn.benchmark,
        "tf32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.fixture(params=["as PyTorch has them", "all unlike"])
def users(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A user's own settings."""
    unlike = request.param == "all unlike"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if unlike:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with kept():
        torch.utils.deterministic.fill_uninitialized_memory = not unlike  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = unlike
        torch.set_num_threads(3 if unlike else 2)
        torch.use_deterministic_algorithms(unlike, warn_only=unlike)
        yield settings()


@pytest.mark.parametrize("reduction", ["exact", "ddp"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_what_was_pinned_is_restored(users: dict[str, Any], reduction: str, lanes: int) -> None:
    config = parse({"reduction": reduction, "precision": "tf32", "scaling": {"lanes": lanes}}, ExperimentConfig, "test")
    with runtime.configure(config, CPU, 8, 1) as here:
        during = settings()
        assert (during["deterministic"], during["warns only"], during["threads"]) == (True, False, 1)
        assert during["workspace"] == ":4096:8"
        assert not during["fill"]
        assert here.run([torch.get_num_threads] * here.replicas) == [1] * here.replicas
    assert settings() == users
    if here.pool is not None:
        with pytest.raises(RuntimeError, match="shutdown"):
            here.run([torch.get_num_threads])


def test_an_error_restores_too(users: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="in between"), runtime.configure(ExperimentConfig(), CPU, 8):
        raise ValueError("in between")
    assert settings() == users


@pytest.mark.parametrize(
    ("tree", "shards", "found"),
    [({}, 8, 8), ({}, 4, 4), ({"scaling": {"lanes": 3}}, 8, 3), ({"reduction": "ddp"}, 8, 1)],
)
def test_replicas_on_a_gpu(tree: dict[str, Any], shards: int, found: int) -> None:
    """As many shards as a worker has run on streams, up to eight; `ddp` makes one batch of them."""
    assert runtime.replicas_of(parse(tree, ExperimentConfig, "test"), shards, 2, on_gpu=True) == found
