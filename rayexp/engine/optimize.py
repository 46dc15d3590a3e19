"""SGD and AdamW on flat buffers, gradient clipping, and the schedules of the learning rate.

The update itself is PyTorch's fused kernel. The buffers are cut into chunks that depend on the model alone, so that
lanes can share the work and every element is always treated by the same call.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from rayexp.config import ExperimentConfig
from rayexp.engine.flat import Layout
from rayexp.engine.place import Place

_CHUNK = 1 << 20  # elements on a CPU; 4 MiB of each of three or four buffers stay in a last-level cache
_ALIGN = 16


class Optimizer:
    """One optimizer over the master's flat parameters.

    `state` maps a buffer's name (momentum_buffer, exp_avg, exp_avg_sq) to fp32[P], laid out like the parameters.
    """

    def __init__(self, config: ExperimentConfig, layout: Layout, params: Tensor) -> None:
        self.config, self.params = config.optimizer, params
        adam = config.optimizer.name == "adamw"
        names = ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",) if config.optimizer.momentum else ()
        self.state = {name: torch.zeros_like(params) for name in names}
        self.chunks: list[tuple[slice, float]] = []
        for start, end, decay in ((0, layout.decayed, config.weight_decay), (layout.decayed, layout.size, 0.0)):
            count = 1 if params.is_cuda else max(1, round((end - start) / _CHUNK))
            edges = [start + (end - start) * i // count // _ALIGN * _ALIGN for i in range(count)] + [end]
            self.chunks += [(slice(a, b), decay) for a, b in itertools.pairwise(edges) if a < b]

    def update(self, gradient: Tensor, count: float, lr: float, step: int, place: Place) -> None:
        """One step. `gradient` (fp32[P], the SUM over samples) is divided by `count` and clipped in place.

        Args:
            step: counts from 1, for AdamW's bias correction.
        """
        lanes = range(place.lanes)
        scale = 1.0 / count if count else 0.0
        if self.config.clip is not None:
            norms: list[Tensor] = [gradient] * len(self.chunks)

            def measure(lane: int) -> None:
                for i in range(lane, len(self.chunks), place.lanes):
                    norms[i] = torch.linalg.vector_norm(gradient[self.chunks[i][0]], dtype=torch.float64)

            place.run([lambda lane=lane: measure(lane) for lane in lanes])  # type: ignore[misc]
            # As torch.nn.utils.clip_grad_norm_: the factor is at most 1; NaN stays NaN.
            norm = math.sqrt(sum(n * n for n in torch.stack(norms).tolist())) * scale
            factor = self.config.clip / (norm + 1e-6)
            scale *= factor if not factor >= 1 else 1.0

        def advance(lane: int) -> None:
            with torch.no_grad():
                for where, decay in self.chunks[lane :: place.lanes]:
                    self._advance(where, gradient[where].mul_(scale), decay, lr, step)

        place.run([lambda lane=lane: advance(lane) for lane in lanes])  # type: ignore[misc]

    def _advance(self, where: slice, grad: Tensor, decay: float, lr: float, step: int) -> None:
        c = self.config
        params = [self.params[where]]
        if c.name == "adamw":
            torch._fused_adamw_(
                params,
                [grad],
                [self.state["exp_avg"][where]],
                [self.state["exp_avg_sq"][where]],
                [],
                [torch.full((), float(step), device=grad.device)],
                lr=lr,
                beta1=c.betas[0],
                beta2=c.betas[1],
                weight_decay=decay,
                eps=c.eps,
                amsgrad=False,
                maximize=False,
            )
            return
        momentum = [self.state["momentum_buffer"][where]] if c.momentum else []
        torch._fused_sgd_(
            params,
            [grad],
            momentum,
            weight_decay=decay,
            momentum=c.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=c.nesterov,
            maximize=False,
            is_first_step=False,
        )


class Schedule:
    """The learning rate as a function of the step; `plateau` also remembers the best validation loss."""

    def __init__(self, config: ExperimentConfig, steps: int) -> None:
        self.config, self.peak, self.steps = config.schedule, config.lr, steps
        self.total = config.epochs * steps
        self.factor = 1.0
        self.best = math.inf

    def lr(self, step: int) -> float:
        """The rate for global step `step`, counted from 0."""
        c = self.config
        warmup = c.warmup_epochs * self.steps
        if c.name == "onecycle":
            return self._onecycle(step)
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if c.name == "step":
            return self.peak * rise * c.gamma ** (step // self.steps // c.step_epochs)
        if c.name == "cosine" and step >= warmup:
            # Loshchilov and Hutter 2017, one period.
            done = (step - warmup) / max(1.0, self.total - warmup)
            return c.min_lr + (self.peak - c.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.peak * rise * self.factor

    def _onecycle(self, step: int) -> float:
        """Smith and Topin 2018 with linear sides: from 1/25 of the peak up, then down to `min_lr`."""
        top = max(1.0, self.config.peak * self.total)
        if step < top:
            return self.peak * (0.04 + 0.96 * (step + 1) / top)
        down = (step - top) / max(1.0, self.total - top)
        return self.config.min_lr + (self.peak - self.config.min_lr) * max(0.0, 1 - down)

    def epoch(self, val_loss: float) -> None:
        """After an epoch: `plateau` shrinks the rate if the validation loss is no better than the best."""
        if self.config.name != "plateau":
            return
        if val_loss < self.best:
            self.best = val_loss
        else:
            self.factor *= self.config.gamma

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"factor": self.factor, "best": None if math.isinf(self.best) else self.best}

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.factor = state["factor"]
        self.best = math.inf if state["best"] is None else state["best"]
