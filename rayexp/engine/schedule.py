"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

from rayexp.config import ExperimentConfig
from rayexp.engine.own_rules import open_schedule


class Schedule:
    """The learning rate as a function of the step; `plateau` also remembers the best validation loss.

    Attributes:
        config: the configuration's `schedule` section.
        peak: the configured learning rate.
        steps: optimizer steps of an epoch.
        total: optimizer steps of the run.
        factor: by which `plateau` has shrunk the rate so far.
        best: the lowest validation loss so far.
        own: the factor of the rate at a step, where the schedule is the user's own.
    """

    def __init__(self, config: ExperimentConfig, steps: int) -> None:
        self.config, self.peak, self.steps = config.schedule, config.lr, steps
        self.total = config.epochs * steps
        self.factor = 1.0
        self.best = math.inf
        self.own = open_schedule(config, steps)

    def lr(self, step: int) -> float:
        """The learning rate of global step `step`, counted from 0."""
        c = self.config
        warmup = c.warmup_epochs * self.steps
        if c.name == "onecycle":
            return self._onecycle(step)
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if self.own is not None:
            return self.peak * rise * self.own(step)
        if c.name == "step":
            return self.peak * rise * c.gamma ** (step // self.steps // c.step_epochs)
        if c.name == "cosine" and step >= warmup:
            # Loshchilov and Hutter 2017, one period.
            done = (step - warmup) / max(1.0, self.total - warmup)
            return c.min_lr + (self.peak - c.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.peak * rise * self.factor

    def _onecycle(self, step: int) -> float:
        """Smith and Topin 2018 with linear sides: from 1/25 of the peak up to it, then down to `min_lr`.

        A rising step takes the rate at its end, a falling one the rate at its beginning. So both ends of the schedule
        lie just outside the run, and the peak is held for two steps. torch's OneCycleLR puts both ends on steps; the
        two differ by at most one step's change of the rate.
        """
        top = max(1.0, self.config.peak * self.total)
        if step < top:
            return self.peak * (0.04 + 0.96 * min(1.0, (step + 1) / top))
        down = (step - top) / max(1.0, self.total - top)
        return self.config.min_lr + (self.peak - self.config.min_lr) * max(0.0, 1 - down)

    def epoch(self, val_loss: float) -> None:
        """End an epoch: `plateau` shrinks the rate where the validation loss is not below the best so far."""
        if self.config.name != "plateau":
            return
        if val_loss < self.best:
            self.best = val_loss
        else:
            self.factor *= self.config.gamma

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to continue the schedule."""
        return {"factor": self.factor, "best": None if math.isinf(self.best) else self.best}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.factor = state["factor"]
        self.best = math.inf if state["best"] is None else state["best"]
