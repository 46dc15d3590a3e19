"""An optimizer's update rule and a schedule of the user's own, named by reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from rayexp.config import ExperimentConfig
from rayexp.config.components import OPTIMIZERS, SCHEDULES
from rayexp.config.references import arguments, call, failure, load_component
from rayexp.errors import UserError

_SHARED = ("momentum", "nesterov", "betas", "eps")  # keys of `optimizer` that a rule may ask for by name
_OF_SCHEDULE = ("step_epochs", "gamma", "min_lr", "peak")
_PROBE = 64  # elements
_WHERE = "(docs/your-own-model.md)"
_FOLLOWS = f"allowed: what follows from `state`, and from `step`, the steps before this one {_WHERE}"


class UpdateRule(Protocol):
    """An elementwise update rule: what happens to an element depends on nothing but this element, its gradient and its
    state. So it has the same bits however the parameters are cut into pieces.

    Attributes:
        state: names of the values that it keeps for each parameter, 0 at the start. Checkpoints hold them.
    """

    state: tuple[str, ...]

    def update(
        self,
        params: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
        weight_decay: float,
    ) -> None:
        """Update parameters and state in place.

        Args:
            params: fp32[n], a piece of all parameters.
            gradient: fp32[n], the mean over the batch, clipped; may be overwritten.
            state: fp32[n] for each name in `state`.
            lr: a scalar on the device.
            step: fp32[], the steps before this one.
            weight_decay: 0 for parameters that do not decay.
        """


def open_rule(config: ExperimentConfig) -> UpdateRule | None:
    """The rule that `optimizer.name` refers to; None for one that comes with rayexp.

    Raises:
        UserError: it cannot be opened, has another form, or is not elementwise.
    """
    section, name = config.optimizer, config.optimizer.name
    if name in OPTIMIZERS:
        return None
    component = load_component("optimizer.name", name, config.code)
    offered = {key: getattr(section, key) for key in _SHARED}
    given = arguments("optimizer", name, component, section.options, offered)
    rule: UpdateRule = call("optimizer.name", name, component, given, config.code)
    state = getattr(rule, "state", None)
    if not (isinstance(state, tuple | list) and all(isinstance(each, str) and each.isidentifier() for each in state)):
        raise UserError(f"optimizer.name: {name} has no `state`, a tuple of names; expected an update rule {_WHERE}")
    if not callable(getattr(rule, "update", None)):
        raise UserError(f"optimizer.name: {name} has no method `update`; expected an update rule {_WHERE}")
    _check_elementwise(rule, config)
    return rule


def _check_elementwise(rule: UpdateRule, config: ExperimentConfig) -> None:
    """Refuse a rule that comes to something else in two pieces than in one, or when it has been called before."""
    name = config.optimizer.name
    first = _tried(rule, config, 1)
    before = _numbers(rule)
    again = _tried(rule, config, 1)
    for key, value in _numbers(rule).items():
        if (was := before.get(key, value)) != value:
            what = f"changes its attribute {key} ({was} -> {value}), which no checkpoint holds"
            raise UserError(f"optimizer.name: {name}: its update {what}; {_FOLLOWS}")
    if not _alike(first, again):
        what = "makes something else of the same values the second time: it keeps something, or draws random numbers"
        raise UserError(f"optimizer.name: {name}: its update {what}; {_FOLLOWS}")
    if not _alike(first, _tried(rule, config, 2)):
        raise UserError(
            f"optimizer.name: {name} is not elementwise: in two pieces the same parameters come to something else; "
            "a norm over all of them is no part of an update rule (optimizer.clip bounds the gradient's)"
        )


def _tried(rule: UpdateRule, config: ExperimentConfig, pieces: int) -> Tensor:
    """Some parameters and their state after two steps, in so many pieces."""
    name = config.optimizer.name
    values = torch.linspace(-1.0, 1.0, 4 * _PROBE).reshape(2, -1)  # of every size, none alike
    params, gradient = (row.clone() for row in values)
    state = {each: torch.zeros_like(params) for each in rule.state}
    for step in range(2):
        for part in range(pieces):
            cut = slice(part * len(params) // pieces, (part + 1) * len(params) // pieces)
            held = {each: tensor[cut] for each, tensor in state.items()}
            try:
                with torch.no_grad():
                    rule.update(
                        params[cut],
                        gradient[cut].clone(),
                        held,
                        torch.tensor(0.1, dtype=torch.float64),
                        torch.tensor(float(step)),
                        config.weight_decay,
                    )
            except Exception as error:
                why = failure(error, config.code)
                raise UserError(f"optimizer.name: {name}: its update fails ({why})") from error
    if torch.equal(params, values[0]):
        raise UserError(f"optimizer.name: {name}: its update changes no parameter; they are updated in place {_WHERE}")
    return torch.cat([params, *state.values()])


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def _numbers(rule: UpdateRule) -> dict[str, str]:
    """Numbers among its attributes, as they are written."""
    held = getattr(rule, "__dict__", {})
    return {key: repr(value) for key, value in held.items() if type(value) in (int, float, bool)}


def open_schedule(config: ExperimentConfig, steps: int) -> Callable[[int], float] | None:
    """The schedule that `schedule.name` refers to, as the factor of the learning rate by global step (from 0); None for
    one that comes with rayexp.

    Args:
        steps: optimizer steps of an epoch.

    Raises:
        UserError: it cannot be opened, or gives no number from 0.
    """
    section, name = config.schedule, config.schedule.name
    if name in SCHEDULES:
        return None
    component = load_component("schedule.name", name, config.code)
    total = config.epochs * steps

    def moment(step: int) -> dict[str, Any]:
        return {"step": step, "epoch": step / steps, "progress": step / total}

    fixed = {"steps": steps, "epochs": config.epochs} | {key: getattr(section, key) for key in _OF_SCHEDULE}
    given = arguments("schedule", name, component, section.options, fixed | moment(0))

    def factor(step: int) -> float:
        now = {key: value for key, value in moment(step).items() if key in given}
        value = call("schedule.name", name, component, given | now, config.code)
        if not isinstance(value, float | int) or not (math.isfinite(value) and value >= 0):
            raise UserError(f"schedule.name: {name} gives {value!r} at step {step}; expected a number from 0")
        return float(value)

    factor(0)
    return factor
