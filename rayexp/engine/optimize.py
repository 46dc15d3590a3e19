"""SGD and AdamW on flat buffers, gradient clipping, and the schedules of the learning rate.

The update itself is PyTorch's fused kernel. The buffers are cut into chunks that depend on the model alone, so that
lanes can share the work and every element is always treated by the same call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayexp.config import ExperimentConfig
from rayexp.engine.flat import Layout, Touched
from rayexp.engine.place import Place

_CHUNK = 1 << 20  # elements on a CPU; 4 MiB of each of three or four buffers stay in a last-level cache
_ALIGN = 16


class Optimizer:
    """One optimizer over the master's flat parameters.

    `state` maps a buffer's name (momentum_buffer, exp_avg, exp_avg_sq) to fp32[P], laid out like the parameters.

    Args:
        touched: parameters whose gradient is zero but for some rows; `update` is told which.
    """

    def __init__(
        self, config: ExperimentConfig, layout: Layout, params: Tensor, touched: Sequence[Touched] = ()
    ) -> None:
        self.config, self.layout, self.params = config.optimizer, layout, params
        adam = config.optimizer.name == "adamw"
        names = ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",) if config.optimizer.momentum else ()
        self.state = {name: torch.zeros_like(params) for name in names}
        # Without momentum and decay, SGD leaves a parameter alone whose gradient is zero.
        self.rows_alone = not names and config.weight_decay == 0
        apart = [(t.start - layout.head, t.stop - layout.head) for t in touched] if self.rows_alone else []
        # What is left out lies where everything is treated alike: edges stay in order.
        edges = sorted({0, layout.decayed, layout.size, *itertools.chain.from_iterable(apart)})
        self.chunks: list[tuple[slice, float]] = []
        for start, end in itertools.pairwise(edges):
            if (start, end) in apart:
                continue
            count = 1 if params.is_cuda else max(1, round((end - start) / _CHUNK))
            cuts = [start + (end - start) * i // count // _ALIGN * _ALIGN for i in range(count)] + [end]
            decay = config.weight_decay if start < layout.decayed else 0.0
            self.chunks += [(slice(a, b), decay) for a, b in itertools.pairwise(cuts) if a < b]

    def update(
        self, row: Tensor, count: float, lr: float, step: int, place: Place, touched: Sequence[Touched] = ()
    ) -> None:
        """One step. The gradient in the row (the SUM over samples) is divided by `count` and clipped in place.

        Args:
            step: counts from 1, for AdamW's bias correction.
            touched: this step's rows.
        """
        gradient = self.layout.gradient(row)
        parts = [
            _Part(self.params[where], gradient[where], {n: s[where] for n, s in self.state.items()}, decay)
            for where, decay in self.chunks
        ]
        sparse = [(t.rows, t.matrix(self.params, self.layout.head), t.matrix(row)) for t in touched if self.rows_alone]
        gathered = [_Part(weight[rows], grad[rows], {}, 0.0) for rows, weight, grad in sparse]
        parts += gathered
        lanes = range(place.lanes)
        scale = 1.0 / count if count else 0.0
        if self.config.clip is not None:
            norms: list[Tensor] = [gradient] * len(parts)

            def measure(lane: int) -> None:
                for i in range(lane, len(parts), place.lanes):
                    norms[i] = torch.linalg.vector_norm(parts[i].gradient, dtype=torch.float64)

            place.run([lambda lane=lane: measure(lane) for lane in lanes])  # type: ignore[misc]
            # As torch.nn.utils.clip_grad_norm_: the factor is at most 1; NaN stays NaN.
            norm = math.sqrt(sum(n * n for n in torch.stack(norms).tolist())) * scale
            factor = self.config.clip / (norm + 1e-6)
            scale *= factor if not factor >= 1 else 1.0

        def advance(lane: int) -> None:
            with torch.no_grad():
                for part in parts[lane :: place.lanes]:
                    part.gradient.mul_(scale)
                    self._advance(part, lr, step)

        place.run([lambda lane=lane: advance(lane) for lane in lanes])  # type: ignore[misc]
        for part, (rows, weight, _) in zip(gathered, sparse, strict=True):
            weight.index_copy_(0, rows, part.params)

    def _advance(self, part: _Part, lr: float, step: int) -> None:
        c = self.config
        if c.name == "adamw":
            torch._fused_adamw_(
                [part.params],
                [part.gradient],
                [part.state["exp_avg"]],
                [part.state["exp_avg_sq"]],
                [],
                [torch.full((), float(step), device=part.params.device)],
                lr=lr,
                beta1=c.betas[0],
                beta2=c.betas[1],
                weight_decay=part.decay,
                eps=c.eps,
                amsgrad=False,
                maximize=False,
            )
            return
        torch._fused_sgd_(
            [part.params],
            [part.gradient],
            list(part.state.values()),
            weight_decay=part.decay,
            momentum=c.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=c.nesterov,
            maximize=False,
            is_first_step=False,
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Parameters that are updated by one call, with their gradient and the optimizer's state."""

    params: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    decay: float


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
        """Smith and Topin 2018 with linear sides: from 1/25 of the peak up, then down to `min_lr`.

        A step on the way up has the rate at its end, one on the way down that at its beginning, so both ends of the
        schedule lie just outside the run, and the peak is held for two steps. torch's OneCycleLR puts both ends on
        steps: a difference of at most one step's change of the rate.
        """
        top = max(1.0, self.config.peak * self.total)
        if step < top:
            return self.peak * (0.04 + 0.96 * min(1.0, (step + 1) / top))
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
