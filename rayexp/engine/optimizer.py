"""SGD and AdamW on flat buffers, and gradient clipping.

The update itself is PyTorch's fused kernel. The buffers are cut into chunks that depend on the model alone: replicas
share them, and every element is always updated by the same call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from rayexp.config import ExperimentConfig
from rayexp.engine.gradients import COUNT, ParameterLayout, Touched
from rayexp.engine.own_rules import open_rule
from rayexp.engine.runtime import Runtime

_CHUNK = 1 << 20  # elements on a CPU; 4 MiB of each of three or four buffers stay in a last-level cache
_ALIGN = 16


class Optimizer:
    """One optimizer over the master's flat parameters.

    Attributes:
        config: the configuration's `optimizer` section.
        layout: where parameters lie in the buffers.
        params: fp32[P], the master's.
        rule: the update rule, where it is the user's own.
        state: fp32[P] by name (momentum_buffer, exp_avg, exp_avg_sq, or the rule's), laid out like the parameters.
        sparse: whether only the touched rows of an embedding are updated, because the others cannot change.
        chunks: slices of `params` (in elements) and their weight decay; together they cover everything but the touched
            parameters of a `sparse` optimizer.

    Args:
        touched: the parameters whose gradient is zero except in some rows; `update` is told which rows.
    """

    def __init__(
        self, config: ExperimentConfig, layout: ParameterLayout, params: Tensor, touched: Sequence[Touched] = ()
    ) -> None:
        self.config, self.layout, self.params = config.optimizer, layout, params
        self.rule = open_rule(config)
        adam = config.optimizer.name == "adamw"
        names: Sequence[str]
        names = ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",) if config.optimizer.momentum else ()
        if self.rule is not None:
            names = self.rule.state
        self.state = {name: torch.zeros_like(params) for name in names}
        # Without momentum and decay, SGD does not change an element whose gradient is zero.
        self.sparse = self.rule is None and not names and config.weight_decay == 0
        head = layout.head_size
        apart = [(t.start - head, t.stop - head) for t in touched] if self.sparse else []
        # `decayed` lies between two parameters, so no edge falls inside what is left out.
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
        self, buffer: Tensor, lr: Tensor, done: Tensor, runtime: Runtime, touched: Sequence[Touched] = ()
    ) -> None:
        """Update the parameters. The gradient is divided by the buffer's count of loss terms and clipped in place.

        No value is read back: every number that changes from step to step is a tensor on the device.

        Args:
            buffer: fp32[R], a gradient buffer with the SUM over the samples of the global batch.
            lr: the learning rate: float64[] on a CPU, float32[] on a GPU, as the fused kernels take it there.
            done: fp32[], the optimizer steps before this one, for AdamW's bias correction.
            runtime: its replicas share the work.
            touched: this step's touched rows.
        """
        gradient = self.layout.gradient(buffer)
        parts = [
            _Part(self.params[where], gradient[where], {n: s[where] for n, s in self.state.items()}, decay)
            for where, decay in self.chunks
        ]
        head = self.layout.head_size
        sparse = [(t.rows, t.matrix(self.params, head), t.matrix(buffer)) for t in touched if self.sparse]
        gathered = [_Part(weight[rows], grad[rows], {}, 0.0) for rows, weight, grad in sparse]
        parts += gathered
        count = self.layout.scalars(buffer)[COUNT].double()
        scale = torch.where(count > 0, 1.0 / count, 0.0)
        if self.config.clip is not None:
            norms: list[Tensor] = [gradient] * len(parts)

            def measure(replica: int) -> None:
                for i in range(replica, len(parts), runtime.replicas):
                    norms[i] = torch.linalg.vector_norm(parts[i].gradient, dtype=torch.float64)

            runtime.each(measure)
            # As torch.nn.utils.clip_grad_norm_: the factor is at most 1; NaN stays NaN.
            norm = functools.reduce(torch.add, [norm * norm for norm in norms]).sqrt() * scale
            scale = scale * (self.config.clip / (norm + 1e-6)).clamp(max=1.0)

        def advance(replica: int) -> None:
            with torch.no_grad():
                for part in parts[replica :: runtime.replicas]:
                    part.gradient.mul_(scale)
                    self._advance(part, lr, done)

        runtime.each(advance)
        for part, (rows, weight, _) in zip(gathered, sparse, strict=True):
            weight.index_copy_(0, rows, part.params)

    def _advance(self, part: _Part, lr: Tensor, done: Tensor) -> None:
        c = self.config
        if self.rule is not None:
            self.rule.update(part.params, part.gradient, part.state, lr, done, part.decay)
            return
        if c.name == "adamw":
            adamw(
                [part.params],
                [part.gradient],
                [part.state["exp_avg"]],
                [part.state["exp_avg_sq"]],
                [],
                [done.clone()],  # adamw counts it up
                fused=True,
                lr=lr,
                beta1=c.betas[0],
                beta2=c.betas[1],
                weight_decay=part.decay,
                eps=c.eps,
                amsgrad=False,
                maximize=False,
            )
            return
        sgd(
            [part.params],
            [part.gradient],
            [part.state.get("momentum_buffer")],
            fused=True,
            weight_decay=part.decay,
            momentum=c.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=c.nesterov,
            maximize=False,
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Parameters that one call updates, with their gradient and the optimizer's state: fp32 tensors of one shape."""

    params: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    decay: float
