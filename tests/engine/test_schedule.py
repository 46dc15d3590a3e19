"""The learning rate step by step against torch.optim.lr_scheduler; one-cycle, which differs, against its own words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler as theirs

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.schedule import Schedule

LR = 0.3
LENGTHS = [(1, 24), (4, 6), (3, 25), (7, 4)]
"""Epochs, and steps of an epoch."""
Scheduler = theirs.LRScheduler


def schedule(epochs: int, steps: int, **args: Any) -> Schedule:
    return Schedule(parse({"epochs": epochs, "lr": LR, "schedule": args}, ExperimentConfig, "test"), steps)


def rates(one: Schedule) -> list[float]:
    return [one.lr(step) for step in range(one.total)]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)


def walk(count: int, *make: Callable[[torch.optim.Optimizer], Scheduler]) -> list[float]:
    """What torch's schedulers, all of them stepped after every optimizer step, set."""
    one = optimizer()
    schedulers = [each(one) for each in make]
    found = []
    for _ in range(count):
        found.append(one.param_groups[0]["lr"])
        one.step()
        for scheduler in schedulers:
            scheduler.step()
    return found


def rise(warmup: int) -> Callable[[torch.optim.Optimizer], Scheduler]:
    """Linear from 0, where the first step is one step up already: after `warmup` steps the rate is whole."""
    return lambda o: theirs.LinearLR(o, 1 / warmup, 1.0, total_iters=warmup - 1)


@pytest.mark.parametrize(("epochs", "steps"), LENGTHS)
def test_constant(epochs: int, steps: int) -> None:
    assert rates(schedule(epochs, steps)) == [LR] * (epochs * steps)


@pytest.mark.parametrize(("epochs", "steps"), LENGTHS)
@pytest.mark.parametrize("warmup", [0.5, 1.0, 1.5])
def test_warm_up(epochs: int, steps: int, warmup: float) -> None:
    found = rates(schedule(epochs, steps, warmup_epochs=warmup))
    assert found == pytest.approx([LR * min(1, (t + 1) / (warmup * steps)) for t in range(epochs * steps)], rel=1e-12)
    if warmup * steps == int(warmup * steps):
        assert found == pytest.approx(walk(epochs * steps, rise(int(warmup * steps))), rel=1e-9)


@pytest.mark.parametrize(("epochs", "steps"), LENGTHS)
@pytest.mark.parametrize(("step_epochs", "gamma"), [(1, 0.5), (2, 0.1), (3, 0.9)])
@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_step(epochs: int, steps: int, step_epochs: int, gamma: float, warmup: int) -> None:
    """Epochs of warm-up count, as in a chain of torch's schedulers."""
    found = rates(schedule(epochs, steps, name="step", step_epochs=step_epochs, gamma=gamma, warmup_epochs=warmup))
    chain = [lambda o: theirs.StepLR(o, step_epochs * steps, gamma), *([rise(warmup * steps)] if warmup else [])]
    assert found == pytest.approx(walk(epochs * steps, *chain), rel=1e-9)


@pytest.mark.parametrize(("epochs", "steps"), LENGTHS)
@pytest.mark.parametrize("min_lr", [0.0, 0.05])
def test_cosine(epochs: int, steps: int, min_lr: float) -> None:
    found = rates(schedule(epochs, steps, name="cosine", min_lr=min_lr))
    total = epochs * steps
    assert found == pytest.approx(walk(total, lambda o: theirs.CosineAnnealingLR(o, total, min_lr)), rel=1e-6)
    assert found[0] == LR
    assert found[total // 2] == pytest.approx((LR + min_lr) / 2) if total % 2 == 0 else found[total // 2] > min_lr


@pytest.mark.parametrize(("epochs", "steps"), [(4, 6), (3, 25), (7, 4)])
@pytest.mark.parametrize("min_lr", [0.0, 0.05])
@pytest.mark.parametrize("warmup", [1, 2])
def test_cosine_after_warm_up(epochs: int, steps: int, min_lr: float, warmup: int) -> None:
    total, up = epochs * steps, warmup * steps
    found = rates(schedule(epochs, steps, name="cosine", min_lr=min_lr, warmup_epochs=warmup))

    def sequence(o: torch.optim.Optimizer) -> Scheduler:
        return theirs.SequentialLR(o, [rise(up)(o), theirs.CosineAnnealingLR(o, total - up, min_lr)], [up])

    assert found == pytest.approx(walk(total, sequence), rel=1e-6)


@pytest.mark.parametrize(("epochs", "steps"), LENGTHS)
def test_warm_up_that_fills_the_run_leaves_no_room_for_the_cosine(epochs: int, steps: int) -> None:
    total = epochs * steps
    found = rates(schedule(epochs, steps, name="cosine", warmup_epochs=epochs))
    assert found == pytest.approx([LR * (t + 1) / total for t in range(total)])
    assert schedule(epochs, steps, name="cosine", warmup_epochs=epochs).lr(total) == LR
    assert schedule(epochs, steps, name="cosine", min_lr=0.01).lr(total + 5) == pytest.approx(0.01)  # and stays there


@pytest.mark.parametrize("warmup", [0, 2])
def test_plateau(warmup: int) -> None:
    """ReduceLROnPlateau without patience and threshold: an equal loss is no better one, and nan is none."""
    epochs, steps, gamma = 24, 3, 0.5
    rng = np.random.default_rng(2)
    losses = [3.0, 2.0, 2.0, 2.5, 1.9, math.nan, 1.8, 1.8, *rng.uniform(1, 2, 16)]
    mine = schedule(epochs, steps, name="plateau", gamma=gamma, warmup_epochs=warmup)
    other = optimizer()
    plateau = theirs.ReduceLROnPlateau(other, factor=gamma, patience=0, threshold=0.0, eps=0.0)
    warm = rise(warmup * steps)(other) if warmup else None
    seen = set()
    for epoch, loss in enumerate(losses):
        for step in range(epoch * steps, (epoch + 1) * steps):
            assert mine.lr(step) == pytest.approx(other.param_groups[0]["lr"], rel=1e-9)
            seen.add(mine.lr(step))
            other.step()
            if warm is not None:
                warm.step()
        mine.epoch(loss)
        plateau.step(loss)
    assert len(seen) > 5
    assert mine.best == plateau.best == np.nanmin(losses)


def test_only_plateau_minds_the_validation_loss() -> None:
    for name in ("constant", "step", "cosine", "onecycle"):
        one, other = schedule(4, 6, name=name), schedule(4, 6, name=name)
        for _ in range(5):
            one.epoch(1.0)
        assert rates(one) == rates(other)


def test_a_schedule_goes_on_from_its_state() -> None:
    losses = [2.0, 2.1, 1.5, 1.6, 1.7, 1.2, 1.3]
    for at in range(len(losses) + 1):
        whole = schedule(8, 5, name="plateau", gamma=0.3, warmup_epochs=1)
        for loss in losses[:at]:
            whole.epoch(loss)
        again = schedule(8, 5, name="plateau", gamma=0.3, warmup_epochs=1)
        again.load(whole.state())
        for loss in losses[at:]:
            whole.epoch(loss)
            again.epoch(loss)
        assert rates(again) == rates(whole)
        assert again.best == whole.best
    assert schedule(8, 5).state() == {"factor": 1.0, "best": None}


# ---------------------------------------------------------------------- one-cycle


def corners(total: int, peak: float, min_lr: float) -> list[float]:
    """The docstring in numbers: up from 1/25 before the first step to the peak at the end of that share of the steps,
    held for the step after, then down to `min_lr`, which the step after the last would have."""
    top = peak * total
    return np.interp(range(total), [-1, top - 1, top, total], [LR / 25, LR, LR, min_lr]).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 30), (4, 25), (2, 40), (5, 5), (3, 23)])
@pytest.mark.parametrize("peak", [0.1, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("min_lr", [0.0, 0.01])
def test_onecycle(epochs: int, steps: int, peak: float, min_lr: float) -> None:
    total = epochs * steps
    found = rates(schedule(epochs, steps, name="onecycle", peak=peak, min_lr=min_lr))
    assert found == pytest.approx(corners(total, peak, min_lr), rel=1e-9)
    assert max(found) <= LR
    # torch's has the same corners, but half a step apart.
    final = LR / 25 / max(min_lr, 1e-12)
    cycle = walk(
        total - 1,
        lambda o: theirs.OneCycleLR(
            o, LR, total, pct_start=peak, anneal_strategy="linear", div_factor=25, final_div_factor=final,
            cycle_momentum=False,
        ),
    )  # fmt: skip
    apart = LR / min(peak * total, total - peak * total)
    assert np.abs(np.array(found[: total - 1]) - cycle).max() <= 1.1 * apart


@pytest.mark.parametrize("peak", [0.0, 1.0])
def test_onecycle_with_one_side_only(peak: float) -> None:
    found = rates(schedule(2, 10, name="onecycle", peak=peak))
    wanted = [LR * (0.04 + 0.96 * (t + 1) / 20) for t in range(20)]
    if peak == 0:
        wanted = [LR] + [LR * (1 - t / 19) for t in range(19)]
    assert found == pytest.approx(wanted)
