"""An absurd validation loss is explained: running statistics after few steps, else training that diverges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rayexp.engine.diagnosis import absurd_loss, initial_share


@pytest.mark.parametrize("loss", [0.0, 5.3, 14.0, 100.0])
def test_an_ordinary_loss_needs_no_word(loss: float) -> None:
    assert absurd_loss(1, loss, [0.1], 3) is None


def test_a_loss_that_is_no_cross_entropy_may_have_any_size() -> None:
    assert absurd_loss(1, 1e9, [0.1], 3, cross_entropy=False) is None
    assert absurd_loss(1, math.inf, [0.1], 3, cross_entropy=False) is not None


@pytest.mark.parametrize(("loss", "shown"), [(math.nan, "not finite"), (math.inf, "not finite"), (1.2e16, "1.2e+16")])
def test_few_steps_leave_the_running_statistics_where_they_began(loss: float, shown: str) -> None:
    line = absurd_loss(1, loss, [0.1, 0.0003], 3)
    assert line is not None
    assert line.startswith(f"val_loss of epoch 1 is {shown}; ")
    assert "running statistics, and 99.9 % of them are still their initial values after 3 steps" in line


def test_many_steps_or_no_batch_norm_point_to_another_reason() -> None:
    for momenta, steps in (([0.1], 30), ([], 3)):
        line = absurd_loss(4, 1e16, momenta, steps)
        assert line is not None
        assert line.endswith("training diverges; a smaller lr or optimizer.clip may help")
        assert "running" not in line


def test_the_share_is_what_torch_leaves_of_the_initial_values() -> None:
    norm = nn.BatchNorm1d(1, momentum=0.3, dtype=torch.float64)
    for _ in range(4):
        norm(torch.tensor([[5.0], [5.0]], dtype=torch.float64))  # variance 0: what is left of it is the initial 1
    assert norm.running_var is not None
    assert initial_share([0.3, 0.9], 4) == pytest.approx(float(norm.running_var))
    assert initial_share([None], 1) == 0  # an average
    assert initial_share([0.9, None], 1) == pytest.approx(0.1)
