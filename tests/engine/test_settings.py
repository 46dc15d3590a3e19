"""PyTorch's global settings are as before, whatever they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import runtime, settings
from rayexp.engine.settings import HOLDERS, Settings

B: Any = torch.backends
CPU = torch.device("cpu")


def products() -> list[Any]:
    """How float32 products are computed, by the new settings and by the old ones, which may contradict each other."""
    found: list[Any] = [holder.fp32_precision for holder in HOLDERS]
    for read in (torch.get_float32_matmul_precision, lambda: B.cudnn.allow_tf32, lambda: B.cuda.matmul.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("contradiction")
    return found


def new(holder: Any, precision: str) -> Callable[[], None]:
    return lambda: setattr(holder, "fp32_precision", precision)


CHOICES: dict[str, Callable[[], object]] = {
    "as PyTorch has them": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "cuDNN without": lambda: setattr(B.cudnn, "allow_tf32", False),
    "old way": lambda: setattr(B.cuda.matmul, "allow_tf32", True),
    "new way": new(B.cuda.matmul, "tf32"),
    "everything": new(B, "tf32"),
    "convolutions of a CPU": new(B.mkldnn.conv, "bf16"),
    "convolutions of a GPU": new(B.cudnn.conv, "ieee"),
}


@pytest.fixture(params=CHOICES)
def chosen(request: pytest.FixtureRequest) -> Iterator[None]:
    """A user's choice of precision."""
    with settings.kept():
        CHOICES[request.param]()
        yield


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_precision_of_products_is_restored(chosen: None, precision: str) -> None:
    before = products()
    config = parse({"precision": precision}, ExperimentConfig, "test")
    with runtime.configure(config, CPU, 8):
        during = products()
        assert during[-3:] == ["highest", False, False]
        assert not {"tf32", "bf16"} & set(during)
    assert products() == before


def test_a_gpu_takes_tf32_where_it_is_asked_for() -> None:
    with settings.kept():
        settings.pin_precision(tf32=True)
        assert products() == ["tf32"] * len(HOLDERS) + ["high", True, True]


def test_what_a_user_has_set_does_not_reach_training() -> None:
    with settings.kept(), torch.no_grad():
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.backends.cudnn.deterministic = True
        torch.manual_seed(3)
        drawn = torch.get_rng_state()
        with runtime.configure(ExperimentConfig(), CPU, 8):
            here = torch.zeros(2, requires_grad=True)
            assert (here.dtype, here.device.type, (here * 2).requires_grad) == (torch.float32, "cpu", True)
            torch.rand(3)
            torch.backends.cudnn.deterministic = False
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_device().type == "meta"
        assert torch.backends.cudnn.deterministic
        assert not torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), drawn)


def test_threads_are_for_the_block() -> None:
    before = torch.get_num_threads()
    with settings.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_settings_of_one_moment_are_equal() -> None:
    one, two = vars(Settings.now()), vars(Settings.now())
    assert {k: v for k, v in one.items() if k != "random"} == {k: v for k, v in two.items() if k != "random"}
